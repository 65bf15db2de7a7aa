"""The options of every command, and sizes with units."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

_SIZE = r"(\d{1,12})(?:\.(\d{1,3}))?\s?(?:([kmgt])i?b?|(b)?)\Z"
_UNITS = {"b": 1, "k": 2**10, "": 2**20, "m": 2**20, "g": 2**30, "t": 2**40}


class Size(click.ParamType[int]):
    """A size, in MiB. Units are powers of 1024, as in Docker; a part of a MiB counts as a whole one.

    :param minimum: the minimum, in MiB
    """

    name = "size"

    def __init__(self, minimum: int = 1) -> None:
        self._minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if (found := re.match(_SIZE, str(value).strip(), re.IGNORECASE | re.ASCII)) is None:
            self.fail(f"{value!r} is no size; write it like 512M, 1.5G or 10G", param, ctx)
        whole, part, unit = found[1], found[2] or "", (found[3] or found[4] or "").lower()
        size_mb: int = -(-int(whole + part) * _UNITS[unit] // (10 ** len(part) * 2**20))
        if size_mb < self._minimum:
            self.fail(f"{value!r} is less than {self._minimum}M", param, ctx)
        return size_mb


if TYPE_CHECKING:
    from volant.model import Egress

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Options:
    """The options that are allowed before and after the name of a command."""

    api: str | None = None
    remote: str | None = None
    api_key_file: str | None = None
    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    in_project: str | None = None
    """The project of --project; commands about projects have an argument named `project`."""
    host: str | None = None
    """The host of a fleet that is to answer."""
    json: bool = False
    names: bool = False
    """Whether to print only the names in a list."""
    debug: bool = False
    failure: int | None = None
    """The exit code for failures of volar and the daemon, in a command that exits with a program's own code."""


pass_options = click.make_pass_decorator(Options, ensure=True)


_TLS = {
    "--client-key": "The key of --client-cert, if it is in a separate file (VOLANT_CLIENT_KEY).",
    "--client-cert": "A certificate to show to the daemon, in PEM (VOLANT_CLIENT_CERT).",
    "--ca-file": "Certificates of the authorities to trust for https://, in PEM (VOLANT_CA_FILE).",
}
"""The options for TLS, last one first."""


_HOST = partial(
    click.option,
    "--host",
    metavar="NAME",
    help="In a fleet: the host that is to answer, only for itself; `volar hosts list` shows the names.",
)
_OUTPUT = partial(
    click.option, "-o", "--output", type=click.Choice(["text", "json"]), hidden=True, help="json is the same as --json."
)


def common(*, tls: bool = False, host: bool = True) -> Callable[[F], F]:
    """Adds the common options to a command; after the command's name they override those before it.

    :param tls: whether its help shows the options for TLS, which each command has
    :param host: whether it has --host
    """

    def keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value and parameter.name is not None:
            setattr(ctx.ensure_object(Options), parameter.name, value)

    def keep_format(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        if value == "json":
            ctx.ensure_object(Options).json = True

    def decorate(function: F) -> F:
        own: list[click.Parameter] = vars(function).get("__click_params__", [])
        count = len(own)
        # Commands that list something have more formats, and some write to a file.
        has_output = any("-o" in parameter.opts for parameter in own)
        for option in (
            click.option("--debug", is_flag=True, expose_value=False, callback=keep, help="Show stack traces."),
            *(() if has_output else (_OUTPUT(expose_value=False, callback=keep_format),)),
            click.option("--json", is_flag=True, expose_value=False, callback=keep, help="Print JSON, for programs."),
            *(
                click.option(name, metavar="FILE", expose_value=False, callback=keep, hidden=not tls, help=text)
                for name, text in _TLS.items()
            ),
            # A file, never a key: every user of the host can read the arguments of its processes.
            click.option(
                "--api-key-file",
                metavar="FILE",
                expose_value=False,
                callback=keep,
                help="A file whose first line is the API key (VOLANT_API_KEY_FILE, or the key in VOLANT_API_KEY).",
            ),
            click.option(
                "--project",
                "in_project",
                metavar="NAME",
                expose_value=False,
                callback=keep,
                help="For administrators: the project of the names; '*' lists all projects (VOLANT_PROJECT).",
            ),
            *((_HOST(expose_value=False, callback=keep),) if host else ()),
            click.option(
                "--remote",
                metavar="NAME",
                expose_value=False,
                callback=keep,
                help="A daemon added with `volar remote add` (VOLANT_REMOTE; default: see `volar remote use`).",
            ),
            click.option(
                "--api",
                metavar="ADDRESS",
                expose_value=False,
                callback=keep,
                help="The daemon: http://HOST:PORT, https://HOST:PORT or unix:/PATH "
                "(VOLANT_API_BASE; default unix:/run/volant/volant.sock if it exists, otherwise http://127.0.0.1:7777).",
            ),
        ):
            function = option(function)
        # They come last in the help, and click lists what was added first at the end.
        parameters: list[click.Parameter] = vars(function)["__click_params__"]
        parameters[:] = parameters[count:] + parameters[:count]
        return function

    return decorate


def _parse_egress(ctx: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> Egress | None:
    from volant.model import Problem, parse_egress_texts

    try:
        return parse_egress_texts(value) if value else None
    except Problem as problem:
        raise click.BadParameter(problem.detail + (f"; {problem.hint}" if problem.hint else "")) from None


def listing(function: F) -> F:
    """Adds the options for the format of lists to a command."""

    def keep(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
        options = ctx.ensure_object(Options)
        if value == "json":
            options.json = True
        elif value == "name" or value is True:
            options.names = True

    quiet = click.option(
        "-q", "--quiet", is_flag=True, expose_value=False, callback=keep, help="Print only names, one per line."
    )
    output = click.option(
        "-o",
        "--output",
        type=click.Choice(["table", "json", "name"]),
        expose_value=False,
        callback=keep,
        help="The format; json is the same as --json, name the same as -q.  [default: table]",
    )
    return output(quiet(function))


def egress_option(what: str, *, default: str | None = None) -> Callable[[F], F]:
    """Adds the option `--egress` to a command, as `egress`."""
    return click.option(
        "--egress",
        multiple=True,
        metavar="none|all|TARGET[:PORTS][/tcp|udp]",
        callback=_parse_egress,
        help=f"Allowed destinations of {what}: an IPv4 network or a DNS name, * for names below it; may be repeated."
        + (f"  [default: {default}]" if default else ""),
    )


volume_option = click.option(
    "-v",
    "--volume",
    "volumes",
    multiple=True,
    metavar="SOURCE:/PATH[:ro|rw]",
    help="Mount a volume, or a directory of the daemon's host by its path; may be repeated.",
)
