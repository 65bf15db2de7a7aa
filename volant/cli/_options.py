"""The options of every command."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Options:
    """The options that are allowed before and after the name of a command."""

    api: str | None = None
    api_key_file: str | None = None
    json: bool = False
    debug: bool = False


pass_options = click.make_pass_decorator(Options, ensure=True)


def common(*, environment: bool = False) -> Callable[[F], F]:
    """Gives a command these options; after the command's name they override those before it."""

    def keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value and parameter.name is not None:
            setattr(ctx.ensure_object(Options), parameter.name, value)

    def decorate(function: F) -> F:
        for option in (
            click.option("--debug", is_flag=True, expose_value=False, callback=keep, help="Show stack traces."),
            click.option("--json", is_flag=True, expose_value=False, callback=keep, help="Print JSON, for programs."),
            # A file, never a key: every user of the host can read the arguments of its processes.
            click.option(
                "--api-key-file",
                metavar="FILE",
                expose_value=False,
                callback=keep,
                help="A file whose first line is the API key (VOLANT_API_KEY_FILE, or the key in VOLANT_API_KEY).",
            ),
            click.option(
                "--api",
                metavar="ADDRESS",
                envvar="VOLANT_API_BASE" if environment else None,
                expose_value=False,
                callback=keep,
                help="The daemon: http://HOST:PORT, https://HOST:PORT or unix:/PATH "
                "(VOLANT_API_BASE; default unix:/run/volant/volant.sock if it is there, else http://127.0.0.1:7777).",
            ),
        ):
            function = option(function)
        return function

    return decorate
