"""Finished templates in the state directory: `docs/explanation/templates.md` has what lies there.

A template is a directory that got its name when it was whole, and it is one for as long as `template.json` is in it. So
removing begins with that file, and whoever finds a directory without it may take it away.

Looking one up is on the way of each boot: it costs a few calls of `stat`, and reads files only in the first.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import msgspec

from volant.host import Host, inside
from volant.hypervisor import Template

from ._key import TemplateKey

MEMORY, STATE, LAYER, RECORD, USED = "memory", "state", "root.qcow2", "template.json", "used"

_DIGEST = re.compile(r"[0-9a-f]{32}\Z")
_MAX_RECORD = 1024 * 1024
_MAX_STATE = 64 * 1024 * 1024
_NOTE_USE_S = 3600.0
_logger = logging.getLogger("volant.templates")


def template_at(directory: Path, digest: str) -> Template:
    """Where a template lies, whether or not it is there."""
    found = inside(directory, digest)
    return Template(found / MEMORY, found / STATE)


def template_layer(directory: Path, digest: str) -> Path:
    """Where its layer lies, if it has one."""
    return inside(directory, digest) / LAYER


class ReadyTemplate(msgspec.Struct, frozen=True):
    """A template that may be used now."""

    digest: str
    layer: Path | None
    """The template's own, to be copied."""


class TemplateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What `template.json` says."""

    version: int = 1
    key: TemplateKey = msgspec.field(name="recipe")
    """Named `recipe` in `template.json`."""
    plugin: str
    created_at: datetime
    state_sha256: str
    fingerprints: dict[str, str]
    """By the names of the files: as they were when all of it was on the disk."""
    disk_bytes: int
    protocol: int = 1
    """The newest that its agent speaks."""


class TemplateStore:
    """The templates of one daemon."""

    def __init__(self, host: Host, directory: Path, *, enabled: bool = True) -> None:
        self.directory = directory
        self.enabled = enabled
        self._host = host
        self._known: dict[str, TemplateRecord] = {}
        """Those whose `state` has been read and was right."""
        self._used: dict[str, datetime] = {}
        self._noted: dict[str, datetime] = {}
        self.clones: dict[str, int] = {}
        """How often each was given out, since the daemon began."""
        self.on_removed: Callable[[str], None] = lambda digest: None
        """Called with the digest of each template that is removed."""

    # Finding

    async def find(self, key: TemplateKey, digest: str) -> ReadyTemplate | None:
        """The template of a key, checked just now. One that is damaged is removed, and the log says so."""
        if not self.enabled or not self._host.files.exists(self.directory / digest / RECORD):
            return None
        why = await self._damage(digest)
        if why:
            _logger.warning("template %s is not used and removed: %s", digest, why)
            await self.remove(digest)
            return None
        self._used[digest] = self._host.clock.now()
        return ReadyTemplate(digest, template_layer(self.directory, digest) if key.rootfs is not None else None)

    async def _damage(self, digest: str) -> str:
        """Why a template must not be used; empty: it may."""
        try:
            stored = self._known.get(digest) or await self._load(digest)
            if stored.key.digest != digest:
                return "it was made by another key"
            for name, fingerprint in stored.fingerprints.items():
                if self._host.files.fingerprint(self.directory / digest / name) != fingerprint:
                    return f"somebody has touched its {name}"
            if digest not in self._known:
                state = await self._host.files.read(self.directory / digest / STATE, _MAX_STATE)
                if hashlib.sha256(state).hexdigest() != stored.state_sha256:
                    return f"its {STATE} is damaged"
        except (OSError, msgspec.DecodeError) as error:
            return str(error)
        self._known[digest] = stored
        return ""

    async def _load(self, digest: str) -> TemplateRecord:
        data = await self._host.files.read(self.directory / digest / RECORD, _MAX_RECORD)
        return msgspec.json.decode(data, type=TemplateRecord)

    async def all(self) -> dict[str, TemplateRecord]:
        """All that are there, by digest; whether they are whole shows when they are used."""
        found: dict[str, TemplateRecord] = {}
        for digest in self._names():
            try:
                found[digest] = self._known.get(digest) or await self._load(digest)
            except (OSError, msgspec.DecodeError):
                continue
        return found

    async def used_at(self, digest: str, stored: TemplateRecord) -> datetime:
        """When it was given out last, or made."""
        known = self._used.get(digest)
        if known is None:
            try:
                known = datetime.fromisoformat(
                    (await self._host.files.read(self.directory / digest / USED, 64)).decode()
                )
            except (OSError, ValueError):
                known = stored.created_at
            self._used[digest] = self._noted[digest] = known
        return known

    def protocol(self, digest: str) -> int:
        """The newest protocol that the agents of its clones speak, as far as is known here: 1, the oldest, else."""
        known = self._known.get(digest)
        return 1 if known is None else known.protocol

    def count_clone(self, digest: str) -> None:
        """A VM runs that began as a clone of it."""
        self.clones[digest] = self.clones.get(digest, 0) + 1

    # Making and removing

    async def add(self, fresh: Path, digest: str, key: TemplateKey, plugin: str, protocol: int = 1) -> None:
        """Take a finished template, whose files are on the disk, from `fresh`, a directory beside the others.

        Raises OSError.
        """
        host = self._host
        names = [MEMORY, STATE, *([LAYER] if key.rootfs is not None else [])]
        stored = TemplateRecord(
            key=key,
            plugin=plugin,
            created_at=host.clock.now(),
            state_sha256=hashlib.sha256(await host.files.read(fresh / STATE, _MAX_STATE)).hexdigest(),
            fingerprints={name: host.files.fingerprint(fresh / name) for name in names},
            disk_bytes=sum(host.disk.used(fresh / name) for name in names),
            protocol=protocol,
        )
        await host.files.write(fresh / RECORD, msgspec.json.format(msgspec.json.encode(stored)))
        await self.remove(digest)
        await host.files.put_in_place(fresh, self.directory / digest)

    async def remove(self, digest: str) -> None:
        """Take one away; VMs that go on from it keep what they have. Nothing there is no error. Raises OSError."""
        directory = inside(self.directory, digest)
        for known in (self._known, self._used, self._noted, self.clones):
            known.pop(digest, None)
        self.on_removed(digest)
        if self._host.files.exists(directory):
            await self._host.files.remove(directory / RECORD)
            await self._host.files.remove_tree(directory)

    async def sweep(self) -> None:
        """Take away what is no template: half-made and half-removed ones. Nobody may be making one. Raises OSError."""
        await self._host.files.mkdir(self.directory)
        for name in self._host.files.names(self.directory):
            if not _DIGEST.match(name) or not self._host.files.exists(self.directory / name / RECORD):
                await self._host.files.remove_tree(self.directory / name)

    async def evict(self, max_bytes: int, max_age: timedelta) -> None:
        """Take away what is not used, and what is used least where all together are too much. Raises OSError."""
        stored = await self.all()
        used = {digest: await self.used_at(digest, each) for digest, each in stored.items()}
        total = sum(each.disk_bytes for each in stored.values())
        now = self._host.clock.now()
        for digest in sorted(used, key=lambda each: used[each]):
            if total <= max_bytes and now - used[digest] <= max_age:
                await self._note_use(digest, used[digest])
                continue
            _logger.info("template %s is evicted; it was last used at %s", digest, used[digest])
            total -= stored[digest].disk_bytes
            await self.remove(digest)

    async def _note_use(self, digest: str, used: datetime) -> None:
        """Keep over restarts when one was used."""
        noted = self._noted.get(digest)
        if noted is None or (used - noted).total_seconds() >= _NOTE_USE_S:
            await self._host.files.write(self.directory / digest / USED, used.isoformat().encode())
            self._noted[digest] = used

    def _names(self) -> list[str]:
        try:
            return [name for name in self._host.files.names(self.directory) if _DIGEST.match(name)]
        except OSError:
            return []
