"""Finished templates in the state directory; `docs/explanation/templates.md` describes the files.

A template is a directory that was renamed when it was complete, and contains a `template.json`. A removal begins with
that file, so a directory without it is the remains of an interrupted removal.

Each boot looks up a template, which costs a few calls of `stat`, and reads files only the first time.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import msgspec

from volant.host import Host, inside
from volant.hypervisor import Template
from volant.store import Damaged, Seal, SealedDirectories

from ._key import TemplateKey

MEMORY, STATE, LAYER, RECORD, USED = "memory", "state", "root.qcow2", "template.json", "used"

_DIGEST = re.compile(r"[0-9a-f]{32}\Z")
_NOTE_USE_S = 3600.0
_logger = logging.getLogger("volant.templates")


def template_at(directory: Path, digest: str) -> Template:
    """Returns the paths of a template, whether or not it exists."""
    found = inside(directory, digest)
    return Template(found / MEMORY, found / STATE)


def template_layer(directory: Path, digest: str) -> Path:
    """Returns the path of its layer, if it has one."""
    return inside(directory, digest) / LAYER


class ReadyTemplate(msgspec.Struct, frozen=True):
    """A template from which a VM can be cloned now."""

    digest: str
    layer: Path | None
    """The layer to copy."""


class TemplateRecord(Seal, frozen=True, kw_only=True):
    """The content of `template.json`."""

    key: TemplateKey = msgspec.field(name="recipe")
    """The key; named `recipe` in `template.json`."""
    plugin: str
    created_at: datetime


class TemplateStore:
    """The templates of one daemon."""

    def __init__(self, host: Host, directory: Path, *, enabled: bool = True) -> None:
        self.directory = directory
        self.enabled = enabled
        self._host = host
        self._sealed = SealedDirectories(host, RECORD, STATE, TemplateRecord)
        self._used: dict[str, datetime] = {}
        self._noted: dict[str, datetime] = {}
        self.clones: dict[str, int] = {}
        """The number of VMs cloned from each since the daemon started."""
        self.on_removed: Callable[[str], None] = lambda digest: None
        """Called with the digest of each removed template."""

    # Finding

    async def find(self, key: TemplateKey, digest: str) -> ReadyTemplate | None:
        """Returns the template with a key, after a check of its files. A damaged one is removed and logged."""
        if not self.enabled or not self._sealed.exists(self.directory / digest):
            return None
        try:
            stored = await self._sealed.check(self.directory / digest)
            if stored.key.digest != digest:
                raise Damaged("it was made for another key")
        except Damaged as why:
            _logger.warning("template %s is not used and removed: %s", digest, why)
            await self.remove(digest)
            return None
        self._used[digest] = self._host.clock.now()
        return ReadyTemplate(digest, template_layer(self.directory, digest) if key.rootfs is not None else None)

    def has(self, plugin: str, cpu_cores: int, memory_mb: int) -> bool:
        """Returns whether a template that was built or used since the daemon started fits such VMs of a plugin, without
        checking its files."""
        wanted = (plugin, cpu_cores, memory_mb)
        return self.enabled and any(
            (each.plugin, each.key.cpu_cores, each.key.memory_mb) == wanted for each in self._sealed.known.values()
        )

    async def all(self) -> dict[str, TemplateRecord]:
        """Returns all templates by digest. Their files are not checked."""
        found: dict[str, TemplateRecord] = {}
        for digest in self._names():
            try:
                found[digest] = await self._sealed.load(self.directory / digest)
            except (OSError, ValueError):
                continue
        return found

    async def used_at(self, digest: str, stored: TemplateRecord) -> datetime:
        """Returns when a VM was last cloned from it; otherwise when it was built."""
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
        """Returns the newest protocol that the agents of its clones are known to support; 1 while unknown."""
        known = self._sealed.known.get(self.directory / digest)
        return 1 if known is None else known.protocol

    def count_clone(self, digest: str) -> None:
        """Counts a running VM that began as its clone."""
        self.clones[digest] = self.clones.get(digest, 0) + 1

    # Making and removing

    async def add(self, fresh: Path, digest: str, key: TemplateKey, plugin: str, protocol: int = 1) -> None:
        """Adds a finished template, whose files are synced, from the directory `fresh` next to the others.

        :raises OSError:
        """
        names = [MEMORY, STATE, *([LAYER] if key.rootfs is not None else [])]
        created_at = self._host.clock.now()
        stored = await self._sealed.seal(fresh, names, key=key, plugin=plugin, created_at=created_at, protocol=protocol)
        await self.remove(digest)
        await self._host.files.put_in_place(fresh, self.directory / digest)
        self._sealed.known[self.directory / digest] = stored

    async def remove(self, digest: str) -> None:
        """Removes a template, if it exists. VMs cloned from it are not affected. :raises OSError:"""
        directory = inside(self.directory, digest)
        for known in (self._used, self._noted, self.clones):
            known.pop(digest, None)
        self.on_removed(digest)
        await self._sealed.remove(directory)

    async def sweep(self) -> None:
        """Removes unfinished and partly removed templates. No build may be running. :raises OSError:"""
        await self._host.files.mkdir(self.directory)
        for name in self._host.files.names(self.directory):
            if not _DIGEST.match(name) or not self._sealed.exists(self.directory / name):
                await self._host.files.remove_tree(self.directory / name)

    async def evict(self, max_bytes: int, max_age: timedelta) -> None:
        """Removes templates that were not used for `max_age`, and the least recently used ones beyond `max_bytes`.

        :raises OSError:
        """
        stored = await self.all()
        used = {digest: await self.used_at(digest, each) for digest, each in stored.items()}
        total = sum(each.size_bytes for each in stored.values())
        now = self._host.clock.now()
        for digest in sorted(used, key=lambda each: used[each]):
            if total <= max_bytes and now - used[digest] <= max_age:
                await self._note_use(digest, used[digest])
                continue
            _logger.info("template %s is evicted; it was last used at %s", digest, used[digest])
            total -= stored[digest].size_bytes
            await self.remove(digest)

    async def _note_use(self, digest: str, used: datetime) -> None:
        """Stores the time of the last use, over restarts of the daemon."""
        noted = self._noted.get(digest)
        if noted is None or (used - noted).total_seconds() >= _NOTE_USE_S:
            await self._host.files.write(self.directory / digest / USED, used.isoformat().encode())
            self._noted[digest] = used

    def _names(self) -> list[str]:
        try:
            return [name for name in self._host.files.names(self.directory) if _DIGEST.match(name)]
        except OSError:
            return []
