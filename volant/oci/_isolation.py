"""The isolation of programs that fetch and convert images, see `docs/explanation/sandbox.md`."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from volant.host import TREES_SINCE, Grant, Host, Sandbox, landlock_version, numbered, user_of_images

_SKOPEO_READS = (
    *("/etc/containers", "/etc/docker/certs.d", "/etc/ssl", "/etc/pki", "/etc/ca-certificates", "/etc/crypto-policies"),
    *("/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/hosts", "/etc/host.conf", "/etc/gai.conf", "/etc/services"),
    *("/etc/passwd", "/etc/group", "/etc/localtime", "/etc/protocols"),
)
"""Files that skopeo and Go's resolver read, if they exist."""


class Isolation(msgspec.Struct, frozen=True, kw_only=True):
    """The isolation of these programs on this host."""

    landlock: int = msgspec.field(default_factory=landlock_version)
    """The kernel's version of Landlock; 0 without it."""
    users: range | None = None
    """The users and groups for sandboxes; None if the programs run as the daemon's user."""
    places: tuple[Path, ...] = ()
    """The daemon's directories through which these users may pass."""

    @property
    def user(self) -> int | None:
        """The user of the programs, and their group."""
        return None if self.users is None else user_of_images(self.users)

    def skopeo(self, work: Path, transport: str, read: Iterable[Path], ports: Collection[int]) -> Sandbox:
        """Returns the sandbox of skopeo, which writes below `work`, reads `read` and connects to TCP `ports`."""
        wanted = (*map(Path, _SKOPEO_READS), *read)
        return Sandbox(
            # A directory of the host is read with the daemon's rights.
            user=None if transport == "oci" else self.user,
            # Before, no file can be moved to another directory.
            landlock=self.landlock >= TREES_SINCE,
            read=tuple(path for path in wanted if path.exists()),
            trees=(work,),
            # It unpacks archives as they are.
            modes=transport.endswith("-archive"),
            tcp=tuple(ports),
            no_connect=not ports,
        )

    async def share(self, host: Host, directory: Path) -> None:
        """Lets the programs use a new directory of the daemon. :raises OSError: it failed."""
        if self.user is not None:
            await host.sandbox.share_directory(directory, self.user, self.places)

    async def let_read(self, host: Host, path: Path) -> None:
        """Lets the programs, and no other user, read a file of the daemon. :raises OSError: it failed."""
        if self.user is not None:
            await host.sandbox.grant([Grant(path, "user", self.user, 4)], self.places)

    async def prepare_files(self, host: Host, made: Sequence[Path], held: Sequence[Path]) -> tuple[int, ...]:
        """Lets the programs write empty files of the daemon, and read layers of the cache. Returns the groups that they
        need for the layers. :raises OSError: it failed."""
        if self.users is None or self.user is None:
            return ()
        # As hypervisors read them.
        groups = {path: numbered(self.users, host.files.fingerprint(path)) for path in held}
        grants = [Grant(path, "user", self.user, 6) for path in made]
        grants += [Grant(path, "group", group, 4) for path, group in groups.items()]
        await host.sandbox.grant(grants, self.places)
        return tuple(sorted(set(groups.values())))


def open_theirs(path: Path) -> BinaryIO:
    """Opens a file written by such a program for reading. Its name may be a link, or a pipe without a writer.

    :raises OSError: it is not a regular file
    """
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return file
