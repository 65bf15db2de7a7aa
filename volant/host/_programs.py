"""Other programs: their environment, their users, and a limit of their output."""

from __future__ import annotations

import hashlib
from pathlib import Path

import trio

from ._host import Host


def numbered(users: range, name: str) -> int:
    """Returns the group that is derived from a name, such as the fingerprint of a file."""
    return users[number_of(name) % len(users)]


def number_of(name: str) -> int:
    """Returns a number that is derived from a name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6])


def user_of_passt(users: range) -> int:
    """Returns the user of passt: the last one."""
    return users[-1]


def user_of_images(users: range) -> int:
    """Returns the user of the programs that fetch and convert images: the last but one."""
    return users[-2]


def users_without_vm(users: range) -> range:
    """Returns the users of hypervisors that have no VM yet: the third quarter."""
    return users[len(users) // 2 : len(users) * 3 // 4]


def users_of_restricted_passt(users: range) -> range:
    """Returns the users of passts with their own rules: the last quarter, without the users above."""
    return users[len(users) * 3 // 4 : -2]


LOG_LIMIT = 1024 * 1024
"""Maximum size of a program's log, as a guest can make it log errors forever."""
LOG_PAUSE_S = 1.0


async def bound_log(host: Host, path: Path) -> None:
    """Keeps a log within `LOG_LIMIT`, until cancelled or its directory is removed."""
    try:
        while True:
            with host.watches.open(path) as watch:
                await host.files.empty_if_larger(path, LOG_LIMIT)
                await watch.wait()
            # Without the pause, a thousand lines a second would cost a CPU.
            await trio.sleep(LOG_PAUSE_S)
    except OSError:
        pass


PROGRAM_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


class CopyFailed(Exception):
    """A file was not copied. The text is for people."""


async def copy_sparsely(host: Host, source: Path, target: Path, timeout_s: float) -> None:
    """Copies a file without its pages of zeros, in a separate process, as it reads a lot.

    :raises CopyFailed: :raises OSError:
    """
    part = target.with_name(f"{target.name}.part")
    command = ["cp", "--sparse=always", "--", str(source), str(part)]
    try:
        status, output = await host.processes.run(
            command, env=PROGRAM_ENVIRONMENT, cwd=target.parent, timeout_s=timeout_s
        )
    except trio.TooSlowError:
        raise CopyFailed(f"it took more than {timeout_s:g} s") from None
    if status != 0:
        raise CopyFailed(output.decode(errors="replace")[-300:])
    await host.files.put_in_place(part, target)
