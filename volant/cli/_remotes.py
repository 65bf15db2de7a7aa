"""The named daemons of `volar`: their addresses and credentials.

They are stored in `remotes.json` in the user's configuration directory, readable only by this user. It has the paths of
keys, never the keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import click
import msgspec

from ._target import LOCAL, remotes_file

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_MAX_FILE = 1024 * 1024


class Remote(msgspec.Struct, frozen=True, omit_defaults=True):
    """One daemon."""

    address: str
    fingerprint: str | None = None
    """The SHA-256 of its certificate, if that is pinned."""
    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    api_key_file: str | None = None


class Remotes(msgspec.Struct, frozen=True, omit_defaults=True):
    """All remotes, and the one that commands use."""

    remotes: dict[str, Remote] = {}
    current: str | None = None
    """The remote that commands use; None for the daemon on this host."""


def load() -> Remotes:
    """Returns the stored remotes. :raises click.UsageError: the file can't be read, or is malformed."""
    path = remotes_file()
    try:
        with path.open("rb") as opened:
            return msgspec.json.decode(opened.read(_MAX_FILE), type=Remotes)
    except FileNotFoundError:
        return Remotes()
    except OSError as error:
        raise click.UsageError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{path} is damaged: {error}; correct or remove it") from None


def change(edit: Callable[[Remotes], Remotes]) -> None:
    """Replaces the stored remotes by the result of `edit`, while no other process changes them. Raises the errors of
    `edit`.

    :raises click.UsageError: the file can't be read or written.
    :raises click.ClickException: another process holds the lock for too long.
    """
    from ._user_files import locked, replace_file

    with locked(remotes_file()):
        replace_file(remotes_file(), edit(load()))


def find(name: str) -> Remote:
    """Returns the remote with a name. :raises click.UsageError: there is none."""
    remotes = load().remotes
    if name in remotes:
        return remotes[name]
    from ._lazy_group import did_you_mean

    raise click.UsageError(f"there is no remote {name!r}.{did_you_mean(name, [LOCAL, *remotes])}")


def check_name(name: str) -> str:
    """Returns `name`. :raises click.UsageError: it is not valid for a remote."""
    if not _NAME.match(name) or name == LOCAL:
        raise click.UsageError(
            f"{name!r} can't be the name of a remote: use lower-case letters, digits and '-', and not {LOCAL!r}"
        )
    return name
