"""`volar mcp`: the configuration of clients of the Model Context Protocol.

Configuration files are copied, committed and shown, so they never contain a key, only a reference to its place. Each
client has its own syntax for such references.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

import click

from volant.client import Address
from volant.client._address import DEFAULT_BASE

from ._options import Options, common, pass_options
from ._output import Output
from ._run import guarded
from ._target import named, target_of

_ROUTE = "/api/v1/mcp"
_HEADER = "X-Volant-API-Key"
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})

Configuration = Mapping[str, object]


@dataclass(frozen=True)
class Client:
    """A client and its configuration."""

    title: str
    where: str
    """The file for the configuration, for people."""
    make: Callable[[str, bool], Configuration]
    """Makes the configuration from the URL, and whether a key is required."""


def _generic(url: str, key: bool) -> Configuration:
    return {"mcpServers": {"volant": {"type": "http", "url": url, **_headers(key, "<the key>")}}}


def _claude_code(url: str, key: bool) -> Configuration:
    return {"mcpServers": {"volant": {"type": "http", "url": url, **_headers(key, "${VOLANT_API_KEY}")}}}


def _claude_desktop(url: str, key: bool) -> Configuration:
    # This client supports only servers on standard input and output, so mcp-remote translates to HTTP.
    arguments = ["-y", "mcp-remote", url, "--transport", "http-only"]
    parts = urlsplit(url)
    if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
        arguments.append("--allow-http")
    server: dict[str, object] = {"command": "npx", "args": arguments}
    if key:
        # No blank after the colon: some versions of the client split arguments there.
        arguments += ["--header", f"{_HEADER}:${{VOLANT_API_KEY}}"]
        server["env"] = {"VOLANT_API_KEY": "<the key>"}
    return {"mcpServers": {"volant": server}}


def _cursor(url: str, key: bool) -> Configuration:
    return {"mcpServers": {"volant": {"url": url, **_headers(key, "${env:VOLANT_API_KEY}")}}}


def _vscode(url: str, key: bool) -> Configuration:
    configuration: dict[str, object] = {
        "servers": {"volant": {"type": "http", "url": url, **_headers(key, "${input:volant-api-key}")}}
    }
    if key:
        configuration["inputs"] = [
            {"type": "promptString", "id": "volant-api-key", "description": "API key of Volant", "password": True}
        ]
    return configuration


def _headers(key: bool, value: str) -> Configuration:
    return {"headers": {_HEADER: value}} if key else {}


CLIENTS = {
    "claude-code": Client("Claude Code", ".mcp.json in the project", _claude_code),
    "claude-desktop": Client(
        "Claude Desktop",
        "claude_desktop_config.json (Settings, Developer, Edit Config); needs Node.js",
        _claude_desktop,
    ),
    "cursor": Client("Cursor", "~/.cursor/mcp.json, or .cursor/mcp.json in the project", _cursor),
    "vscode": Client("Visual Studio Code", ".vscode/mcp.json in the project", _vscode),
    "generic": Client("Others", "the client's list of servers", _generic),
}


@click.command("mcp")
@click.option(
    "--client", type=click.Choice(list(CLIENTS)), help="Print only this client's JSON, for a redirection to a file."
)
@click.option(
    "--key/--no-key",
    default=None,
    help="Whether the daemon requires a key. Default: whether volar has one.",
)
@common()
@pass_options
def group(options: Options, client: str | None, key: bool | None) -> int:
    """Print the configuration that MCP clients need.

    Keys are never printed, only references to their places.
    """
    return guarded(options, lambda: _print(options, client, key))


def _print(options: Options, client: str | None, key: bool | None) -> None:
    url = _url(options)
    with_key = target_of(options).api_key is not None if key is None else key
    out = Output(options.json)
    if client is not None:
        out.document(CLIENTS[client].make(url, with_key))
        out.note(f"Put this into {CLIENTS[client].where}.")
        return
    if options.json:
        out.document({name: known.make(url, with_key) for name, known in CLIENTS.items()})
        return
    for position, (name, known) in enumerate(CLIENTS.items()):
        if position:
            out.line("")
        out.line(f"# {known.title} (--client {name}): {known.where}")
        out.document(known.make(url, with_key))


def _url(options: Options) -> str:
    """Returns the URL of the MCP endpoint. :raises click.UsageError: the address is wrong, or a Unix socket"""
    try:
        given, remote = named(options)
        address = Address.parse(remote.address if remote is not None else given or DEFAULT_BASE)
    except ValueError as error:
        raise click.UsageError(f"--api, VOLANT_API_BASE or --remote: {error}") from None
    if address.socket_path is not None:
        raise click.UsageError(f"MCP clients can't connect to {address.text}: give a host and a port, --api http://…")
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{'https' if address.tls else 'http'}://{host}:{address.port}{address.prefix}{_ROUTE}"
