"""Directories that are written once: templates, and the checkpoints of forks and snapshots.

Such a directory is made under another name (`fresh`) and gets its own once all of it is on the disk, with a record that
has the digest of the `state` and a fingerprint of each file. A removal begins with the record. So a directory without
one is what a killed daemon has left, and a file that was touched is noticed before a VM goes on from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from volant.host import Host

_MAX_RECORD_BYTES = 1024 * 1024
_MAX_STATE_BYTES = 64 * 1024 * 1024
_NEW = ".new"


class Damaged(Exception):
    """A sealed directory was changed. The text has the reason, for people."""


class Seal(msgspec.Struct, frozen=True, kw_only=True):
    """The members of every record."""

    version: int = 1
    state_sha256: str
    """The digest of the file `state`; empty if there is none."""
    fingerprints: dict[str, str]
    """The fingerprints of the complete files, by their names."""
    size_bytes: int
    """Space on the disk, or in memory."""
    protocol: int = 1
    """The newest protocol that the guest's agent is known to support."""


S = TypeVar("S", bound=Seal)


class SealedDirectories(Generic[S]):
    """Sealed directories of one kind, wherever they are."""

    def __init__(self, host: Host, record: str, state: str, kind: type[S]) -> None:
        """
        :param record: the name of the file with the record
        :param state: the name of the file that is hashed as a whole
        :param kind: the type of the record
        """
        self._host = host
        self._record = record
        self._state = state
        self._kind = kind
        self.known: dict[Path, S] = {}
        """The records of directories whose `state` matched its digest."""

    def exists(self, path: Path) -> bool:
        """Returns whether there is such a directory, and no removal of it has begun."""
        return self._host.files.exists(path / self._record)

    async def load(self, path: Path) -> S:
        """Returns a record; checks no file. :raises OSError: :raises ValueError: it is no record"""
        known = self.known.get(path)
        if known is not None:
            return known
        data = await self._host.files.read(path / self._record, _MAX_RECORD_BYTES)
        return msgspec.json.decode(data, type=self._kind)

    async def check(self, path: Path) -> S:
        """Returns a record once the files are known to be as they were sealed. Costs some calls of `stat`, and reads
        `state` the first time only. :raises Damaged:"""
        try:
            record = await self.load(path)
            for name, fingerprint in record.fingerprints.items():
                if self._host.files.fingerprint(path / name) != fingerprint:
                    raise Damaged(f"its {name} was changed")
            if path not in self.known and record.state_sha256:
                state = await self._host.files.read(path / self._state, _MAX_STATE_BYTES)
                if hashlib.sha256(state).hexdigest() != record.state_sha256:
                    raise Damaged(f"its {self._state} has other bytes")
        except (OSError, ValueError) as error:
            raise Damaged(str(error)) from error
        self.known[path] = record
        return record

    async def seal(self, path: Path, names: Sequence[str], **fields: Any) -> S:
        """Writes the record of the files `names`, which are on the disk, into a directory, and returns it.

        :param fields: what the record has besides
        :raises OSError: the disk fails, or is full
        """
        files, digest = self._host.files, ""
        if self._state in names:
            digest = hashlib.sha256(await files.read(path / self._state, _MAX_STATE_BYTES)).hexdigest()
        record = self._kind(
            state_sha256=digest,
            fingerprints={name: files.fingerprint(path / name) for name in names},
            size_bytes=sum(self._host.disk.used(path / name) for name in names),
            **fields,
        )
        await files.write(path / self._record, msgspec.json.format(msgspec.json.encode(record)))
        return record

    async def remove(self, path: Path) -> None:
        """Removes a directory, if it exists. VMs that run from it keep their mapped files. :raises OSError:"""
        self.known.pop(path, None)
        if self._host.files.exists(path):
            await self._host.files.remove(path / self._record)
            await self._host.files.remove_tree(path)


def fresh(path: Path) -> Path:
    """Returns the path at which a file or directory is made before it gets its name."""
    return path.with_name(path.name + _NEW)


def is_fresh(name: str) -> bool:
    """Returns whether a name belongs to an unfinished file or directory."""
    return name.endswith(_NEW)
