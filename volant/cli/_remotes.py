"""The daemons that `volar` knows by name: their addresses, and how each is trusted and addressed.

They are in `remotes.json` in the user's directory for configuration, which only this user may read. It has paths of
keys, never keys.
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
    """SHA-256 of its certificate, if that is pinned."""
    ca_file: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    api_key_file: str | None = None


class Remotes(msgspec.Struct, frozen=True, omit_defaults=True):
    """All of them, and the one that commands use."""

    remotes: dict[str, Remote] = {}
    current: str | None = None
    """None: the daemon on this host."""


def load() -> Remotes:
    """Returns what is stored. :raises click.UsageError: the file can't be read, or has other contents."""
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
    """Replaces what is stored by what `edit` makes of it, while no other process changes it. Raises what `edit` raises.

    :raises click.UsageError: the file can't be read or written.
    :raises click.ClickException: another process changes it for too long.
    """
    from ._user_files import locked, replace_file

    with locked(remotes_file()):
        replace_file(remotes_file(), edit(load()))


def find(name: str) -> Remote:
    """Returns a daemon by its name. :raises click.UsageError: there is none."""
    remotes = load().remotes
    if name in remotes:
        return remotes[name]
    from ._lazy_group import did_you_mean

    raise click.UsageError(f"there is no remote {name!r}.{did_you_mean(name, [LOCAL, *remotes])}")


def check_name(name: str) -> str:
    """Returns `name`. :raises click.UsageError: a remote can't have it."""
    if not _NAME.match(name) or name == LOCAL:
        raise click.UsageError(
            f"{name!r} can't be the name of a remote: use lower-case letters, digits and '-', and not {LOCAL!r}"
        )
    return name
