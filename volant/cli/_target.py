"""The daemon that a command talks to: its address, key and TLS settings."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from volant.client import Tls
from volant.client._address import DEFAULT_BASE, SERVICE_SOCKET

from ._options import Options

if TYPE_CHECKING:
    from ._remotes import Remote

_MAX_KEY_FILE = 64 * 1024


LOCAL = "local"
"""The name of the daemon on this host, which is not stored."""


class Target(NamedTuple):
    """A daemon, and the credentials for it."""

    address: str
    api_key: str | None
    tls: Tls


def target_of(options: Options, remote: Remote | None = None, *, signed_in: bool = True) -> Target:
    """Returns the daemon of a command. `--remote` and `--api` override the environment, which overrides
    `volar remote use`.

    :param remote: use this remote, whatever the options are
    :param signed_in: without a key, use the token of `volar login`
    :raises click.UsageError: the options contradict each other, there is no such remote, or a file can't be read.
    :raises click.ClickException: the sign-in has expired.
    """
    address: str | None = None
    if remote is None:
        address, remote = named(options)
    ca_file, client_cert, client_key = options.ca_file, options.client_cert, options.client_key
    api_key_file, fingerprint = options.api_key_file, None
    if remote is not None:
        address, fingerprint = remote.address, remote.fingerprint
        ca_file, api_key_file = ca_file or remote.ca_file, api_key_file or remote.api_key_file
        client_cert, client_key = client_cert or remote.client_cert, client_key or remote.client_key
    tls = Tls(
        ca_file=ca_file or _environment("VOLANT_CA_FILE"),
        fingerprint=fingerprint,
        cert_file=client_cert or _environment("VOLANT_CLIENT_CERT"),
        key_file=client_key or _environment("VOLANT_CLIENT_KEY"),
    )
    address, key = address or _default_address(), _api_key(api_key_file)
    if key is None and signed_in and tokens_file().exists():
        from . import _tokens

        key = _tokens.token_for(address)
    return Target(address, key, tls)


def named(options: Options) -> tuple[str | None, Remote | None]:
    """Returns the address or the remote of the options, the environment or `volar remote use`; two None for the daemon
    on this host."""
    address, name = options.api, options.remote
    if address and name:
        raise click.UsageError("--api and --remote both name a daemon; give one of them")
    if not address and not name:
        address, name = _environment("VOLANT_API_BASE"), _environment("VOLANT_REMOTE")
        if address and name:
            raise click.UsageError("VOLANT_API_BASE and VOLANT_REMOTE both name a daemon; unset one of them")
    if address or name == LOCAL or (not name and not remotes_file().exists()):
        return address, None
    # Most commands need no remote, and the module takes a while to import.
    from . import _remotes

    name = name or _remotes.load().current
    return None, _remotes.find(name) if name else None


def remotes_file() -> Path:
    """Returns the path of the stored remotes."""
    home = os.environ.get("XDG_CONFIG_HOME")
    return (Path(home) if home else Path.home() / ".config") / "volant" / "remotes.json"


def tokens_file() -> Path:
    """Returns the path of the stored tokens of `volar login`."""
    return remotes_file().with_name("tokens.json")


def _environment(name: str) -> str | None:
    return os.environ.get(name) or None


def _default_address() -> str:
    """Returns the service's socket if it exists, otherwise the address of a daemon in the foreground. If the socket
    exists but access is denied, TCP is not tried, as any local user could listen there."""
    try:
        is_there = stat.S_ISSOCK(os.lstat(SERVICE_SOCKET).st_mode)
    except OSError:
        is_there = False
    return f"unix:{SERVICE_SOCKET}" if is_there else DEFAULT_BASE


def _api_key(file: str | None) -> str | None:
    """Returns the API key: from `file`, the environment, or a file named in the environment.

    :raises click.UsageError: the file can't be read, or has no key.
    """
    key = os.environ.get("VOLANT_API_KEY")
    if file is None and key:
        return key.strip()
    file = file or os.environ.get("VOLANT_API_KEY_FILE")
    if not file:
        return None
    try:
        with Path(file).open("rb") as opened:
            lines = opened.read(_MAX_KEY_FILE).decode("latin-1").splitlines()
    except OSError as error:
        raise click.UsageError(f"the API key file {file!r} can't be read: {error.strerror}") from None
    for line in lines:
        if line.strip() and not line.strip().startswith("#"):
            return line.strip()
    raise click.UsageError(f"the API key file {file!r} has no key in it")
