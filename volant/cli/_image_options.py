"""Options for the programs of images, in `volar run` and `volar vms create --image`, and for their registries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ._complete import secret_names

F = TypeVar("F", bound=Callable[..., Any])

_OPTIONS = (
    click.option("-P", "--publish-all", is_flag=True, help="Publish all ports that the image exposes, on free ports."),
    click.option("-w", "--workdir", metavar="DIR", help="The working directory.  [default: the image's]"),
    click.option("-u", "--user", help="A name or number, optionally with :GROUP.  [default: the image's]"),
    click.option("--entrypoint", help="The program, in place of the image's; empty for none."),
    click.option("--stop-signal", metavar="SIGNAL", help="The signal that stops the program.  [default: the image's]"),
    click.option("--no-healthcheck", is_flag=True, help="Disable the image's health check."),
)


def registry_options(function: F) -> F:
    """Adds the options for credentials of registries to a command, as `authfile` and `registry_secret`."""
    authfile = click.option(
        "--authfile",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Credentials for registries.  [default: $REGISTRY_AUTH_FILE, otherwise ~/.docker/config.json]",
    )
    secret = click.option(
        "--registry-secret",
        metavar="NAME",
        shell_complete=secret_names,
        help="A secret that contains such a file, instead of a file on this host.",
    )
    return authfile(secret(function))


def image_options(function: F) -> F:
    """Adds these options to a command; `image_members` converts them to members of a request."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def image_members(
    words: tuple[str, ...],
    *,
    publish_all: bool,
    workdir: str | None,
    user: str | None,
    entrypoint: str | None,
    stop_signal: str | None,
    no_healthcheck: bool,
) -> dict[str, Any]:
    """Returns members of `CreateVm`. `words` are the program and its arguments, or the arguments of the entrypoint."""
    return {
        "command": words or None,
        "entrypoint": None if entrypoint is None else (entrypoint,) if entrypoint else (),
        "user": user,
        "workdir": workdir,
        "stop_signal": stop_signal,
        "health_check": "none" if no_healthcheck else None,
        "publish_all": publish_all,
    }
