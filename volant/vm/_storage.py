"""Lists this daemon's items on the disk, and removes unused ones.

**The users of an item are looked up when it is removed**, in the projection, without an await in between. The row of a
VM exists before any of its files is fetched or made. So a VM that begins in the meantime is either found, or makes or
fetches its files afterwards (`ArtifactCache.remove`). Images that VMs boot are never removed: the current one is kept,
and the others are named in rows. A process with this daemon's tag counts as a user, independent of the database. If the
template of a VM is removed between the lookup and the launch, the VM boots cold, as with a damaged template.

Disks, snapshots and databases without a row are only removed if their kind is named: they may be the last copy of a
user's work, and a restored database may not know of them. A snapshot with a row has its own route. Volumes are never
removed here, with or without a row.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from pathlib import Path

import msgspec

from volant import images
from volant.host import Host
from volant.images import ArtifactCache
from volant.journal import Store, replaced_databases
from volant.logs import VmLogs
from volant.model import (
    PRUNED_KINDS,
    Artifact,
    Boot,
    Kept,
    Key,
    Manifest,
    Pruned,
    Snapshot,
    StoredItem,
    StoredKind,
    Usage,
    VmRow,
    Volume,
    users_of,
)
from volant.templates import TemplateStore

from ._layout import VmSettings, processes_of_vms

_MAX_ITEMS = 10_000
_LONG_S = 100 * 366 * 86400.0
_VOLUME_ID = 16
"""The length of a volume's id, with which the name of its file begins."""
_A_BUILD = "a build of a template"


class _Item(msgspec.Struct, frozen=True):
    """One item on the disk."""

    kind: StoredKind
    name: str
    bytes: int
    path: Path | None = None
    vm_id: int | None = None
    current: bool = False
    used_at: datetime | None = None
    """The time when a VM was last cloned from the template."""
    others: tuple[str, ...] = ()
    """The other daemons that use it, in a shared cache."""


class _Users(msgspec.Struct):
    """The current users of items."""

    rows: dict[int, VmRow]
    running: frozenset[int]
    """The VMs with a process, including those without a row."""
    plugins: dict[Key, Manifest] = msgspec.field(default_factory=dict)
    snapshots: tuple[Snapshot, ...] = ()
    volumes: tuple[Volume, ...] = ()

    def of(self, found: _Item) -> list[str]:
        return self._ours(found) + list(found.others)

    def _ours(self, found: _Item) -> list[str]:
        match found.kind:
            case "image":
                users = [f"VM {row.name}" for row in self.rows.values() if row.image == found.name]
                return users + [f"snapshot {one.name}" for one in self.snapshots if one.vm.image == found.name]
            case "artifact":
                users = [f"VM {row.name}" for row in self.rows.values() if found.name in _artifacts_of(row.manifest)]
                users += [f"plugin {key.name}" for key, has in self.plugins.items() if found.name in _artifacts_of(has)]
                has_it = [one.name for one in self.snapshots if found.name in _artifacts_of(one.vm.manifest)]
                return users + [f"snapshot {name}" for name in has_it]
            case "snapshot":
                return [f"snapshot {one.name}" for one in self.snapshots if found.name.startswith(one.checkpoint)]
            case "volume":
                names = [f"volume {volume.name}" for volume in self.volumes if found.name.startswith(volume.id)]
                return names + [f"VM {row.name}" for row in users_of(found.name[:_VOLUME_ID], self.rows.values())]
            case "template" if found.current:
                return [_A_BUILD]
            case "template":
                return [f"VM {row.name}" for row in self.rows.values() if row.template == found.name]
            case "disk":
                owners = [f"VM {row.name}" for row in self.rows.values() if row.layer == found.name]
                return owners or self._process(found)
            case "log" | "leftover":
                row = self.rows.get(found.vm_id or 0)
                return [f"VM {row.name}"] if row is not None else self._process(found)
            case _:
                return []

    def _process(self, found: _Item) -> list[str]:
        return ["a process without a VM"] if found.vm_id in self.running else []


def _artifacts_of(manifest: Manifest) -> set[str]:
    boot = manifest.boot or Boot()
    artifacts: tuple[Artifact | None, ...] = (boot.kernel, boot.initramfs, boot.rootfs)
    return {artifact.sha256 for artifact in artifacts if artifact is not None}


class Storage(msgspec.Struct):
    """The disk space of one daemon."""

    host: Host
    store: Store
    logs: VmLogs
    artifacts: ArtifactCache
    templates: TemplateStore
    settings: VmSettings
    instance: str

    async def usage(self) -> Usage:
        """Returns all items, largest first. :raises OSError: they can't be listed."""
        found, running = await self._list()
        users = self._users(running)
        items = sorted((_shown(one, users) for one in found), key=lambda item: (-item.bytes, item.kind, item.name))
        return Usage(
            items=items[:_MAX_ITEMS],
            total_bytes=sum(item.bytes for item in items),
            reclaimable_bytes=sum(item.bytes for item in items if item.reclaimable),
            state_free_bytes=self.host.disk.free(self.store.path.parent),
            cache_free_bytes=self.host.disk.free(self.settings.cache_dir),
        )

    async def prune(self, kinds: Collection[StoredKind] | None, *, dry_run: bool, unused_for_s: float = 0.0) -> Pruned:
        """Removes unused items.

        :param kinds: None for the kinds that can be made again, or whose owner was deleted
        :param unused_for_s: templates from which a VM was cloned within this number of seconds are kept
        :raises OSError: the items can't be listed.
        """
        wanted = PRUNED_KINDS if kinds is None else kinds
        unused_since = self.host.clock.now() - timedelta(seconds=min(unused_for_s, _LONG_S))
        found, running = await self._list()
        gone: list[StoredItem] = []
        kept: list[Kept] = []
        for one in found:
            item = _shown(one, self._users(running))
            if one.kind not in wanted or not item.reclaimable or (one.used_at and one.used_at > unused_since):
                continue
            if dry_run:
                gone.append(item)
                continue
            try:
                if await self._remove(one, running):
                    gone.append(item)
                else:
                    kept.append(Kept(kind=one.kind, name=one.name, reason="it is in use now"))
            except images.ImageError as error:
                kept.append(Kept(kind=one.kind, name=one.name, reason=error.message))
            except OSError as error:
                kept.append(Kept(kind=one.kind, name=one.name, reason=error.strerror or str(error)))
        return Pruned(dry_run=dry_run, freed_bytes=sum(item.bytes for item in gone), items=gone, kept=kept)

    def _users(self, running: frozenset[int]) -> _Users:
        projection = self.store.projection
        plugins = {key: plugin.manifest for key, plugin in projection.plugins.items()}
        rows = {row.id: row for row in projection.rows()}
        snapshots, volumes = tuple(projection.snapshots.values()), tuple(projection.volumes.values())
        return _Users(rows, running, plugins, snapshots, volumes)

    async def _list(self) -> tuple[list[_Item], frozenset[int]]:
        """Returns the items, and the ids of VMs that have a process."""
        found = await self.host.threads.run(self._scan)
        # The processes last: so the files of a VM that was launched meanwhile have a user.
        running = frozenset(each.vm_id for each in await processes_of_vms(self.host, self.instance))
        found += await self._list_templates()
        logs = self.logs.sizes()
        found += [_Item("log", str(vm_id), size, vm_id=vm_id) for vm_id, (size, _) in logs.items()]
        return found, running

    async def _list_templates(self) -> list[_Item]:
        """Returns the templates, including those that are being built."""
        host, store = self.host, self.templates
        whole = await store.all()
        names = {path.name: path for path in _in(host, store.directory)}
        sizes = await host.threads.run(lambda: {name: host.disk.used(path) for name, path in names.items()})
        found = []
        for name, size in sizes.items():
            used_at = await store.used_at(name, whole[name]) if name in whole else None
            found.append(_Item("template", name, size, current=name not in whole, used_at=used_at))
        return found

    def _scan(self) -> list[_Item]:
        host, settings, database = self.host, self.settings, self.store.path
        suffixes = ("", "-wal", "-shm", "-reserve")
        beside = [database.with_name(database.name + suffix) for suffix in suffixes]
        found = [_Item("journal", database.name, sum(map(host.disk.used, beside)))]

        def add(kind: StoredKind, path: Path, vm_id: int | None = None) -> None:
            found.append(_Item(kind, path.name, host.disk.used(path), path, vm_id))

        for path in replaced_databases(database):
            add("database", path)
        for path in _in(host, settings.disk_dir):
            add("disk", path, _id_of(path.name.partition("-")[0]))
        for path in _in(host, settings.snapshot_dir):
            add("snapshot", path)
        for path in _in(host, settings.volume_dir):
            add("volume", path)
        for path in _in(host, settings.runtime_dir / "vms"):
            if (vm_id := _id_of(path.name)) is not None:
                add("leftover", path, vm_id)
        for path in _in(host, settings.memory_dir):
            if path.suffix == ".mem" and (vm_id := _id_of(path.stem)) is not None:
                add("leftover", path, vm_id)
        for image in images.list_images(settings.cache_dir):
            others = self._other_daemons(image.digest)
            found.append(_Item("image", image.digest, image.size_bytes, current=image.current, others=others))
        for artifact in images.list_artifacts(settings.cache_dir):
            others = self._other_daemons(artifact.digest)
            found.append(_Item("artifact", artifact.digest, artifact.disk_bytes, others=others))
        # Images only have links to the layers, and some KiB of their own.
        layers = host.disk.used(settings.cache_dir / "oci" / "layers")
        found.append(_Item("cache", "layers of OCI images", layers))
        rest = [path for path in _in(host, settings.cache_dir) if path.name not in ("images", "artifacts", "oci")]
        found.append(_Item("cache", "packages and indexes", sum(map(host.disk.used, rest))))
        return found

    def _other_daemons(self, digest: str) -> tuple[str, ...]:
        own = self.store.path.parent
        found = images.users(self.settings.cache_dir).of(digest)
        return tuple(f"the daemon of {state_dir}" for state_dir in found if state_dir != own)

    async def _remove(self, item: _Item, running: frozenset[int]) -> bool:
        """Removes an item and returns whether it is gone. :raises images.ImageError: :raises OSError: it can't be
        removed."""

        def in_use() -> bool:
            return bool(self._users(running).of(item))

        match item.kind:
            case "artifact":
                return await self.artifacts.remove(item.name, in_use=in_use)
            case "image":
                return await self.host.threads.run(self._prune_images, item.name)
            case "log":
                return await self.logs.discard(item.vm_id or 0)
            case "template":
                if in_use():
                    return False
                await self.templates.remove(item.name)
                return True
            case _:
                if in_use() or item.path is None:
                    return False
                await self.host.files.remove_tree(item.path)
                return True

    def _prune_images(self, digest: str) -> bool:
        """Removes an image and returns whether it is gone. Other images that are no longer used are removed too."""
        cache_dir, projection = self.settings.cache_dir, self.store.projection
        users = images.users(cache_dir)
        rows = [*projection.rows(), *(one.vm for one in projection.snapshots.values())]
        keep = {row.image for row in rows if row.image is not None}
        for image in images.list_images(cache_dir):
            if image.digest not in keep:
                users.forget(image.digest, self.store.path.parent)
            if users.of(image.digest):
                keep.add(image.digest)
        return digest in images.prune(cache_dir, keep) or not images.load(cache_dir, digest)


def _shown(found: _Item, users: _Users) -> StoredItem:
    used_by = users.of(found)
    # The file of a volume without a row is all that is left of a user's work, after a restore of an old backup.
    fixed = found.kind in ("journal", "cache", "volume") or found.current
    return StoredItem(
        kind=found.kind,
        name=found.name,
        bytes=found.bytes,
        used_by=used_by,
        reclaimable=not used_by and not fixed,
    )


def _in(host: Host, directory: Path) -> list[Path]:
    return [directory / name for name in host.files.names(directory)] if host.files.exists(directory) else []


def _id_of(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 19 else None
