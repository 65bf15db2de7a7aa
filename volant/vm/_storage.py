"""What takes space on the host for this daemon, and what of it can go.

**Who uses a thing is asked at the moment at which it goes**, of the projection, without an await in between. The row of
a VM is there before anything is fetched or made for it. So one that begins meanwhile either is seen, or comes after,
and makes or fetches what it needs (`ArtifactCache.remove`). Images that VMs boot are never removed, as the current one
stays and the others are those of rows. A process that carries our tag counts as a user, whatever the database says.
A template that goes between a VM's look and its launch costs that VM a cold boot, as one that is damaged does.

Disks, snapshots and databases that nobody knows of are removed only when they are named: they may be all that is left
of somebody's work, and a restored database may not know of them. A snapshot that is known goes by its own route.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from volant import images
from volant.host import Host
from volant.journal import replaced_databases
from volant.model import (
    PRUNED_KINDS,
    Artifact,
    Boot,
    Kept,
    Manifest,
    Pruned,
    Snapshot,
    StoredItem,
    StoredKind,
    Usage,
    VmRow,
)

from ._doors import VmDoors
from ._tags import processes_of_vms

_MAX_ITEMS = 10_000
_LONG_S = 100 * 366 * 86400.0
_A_BUILD = "a build of a template"


@dataclass(frozen=True)
class _Item:
    """One thing on the disk."""

    kind: StoredKind
    name: str
    bytes: int
    path: Path | None = None
    vm_id: int | None = None
    current: bool = False
    used_at: datetime | None = None
    """When a template served last."""
    others: tuple[str, ...] = ()
    """Which other daemons use it, where the cache is not ours alone."""


@dataclass
class _Users:
    """Who uses what, as of now."""

    rows: dict[int, VmRow]
    running: frozenset[int]
    """The VMs of which a process of ours runs, also those without a row."""
    plugins: dict[str, Manifest] = field(default_factory=dict)
    snapshots: tuple[Snapshot, ...] = ()

    def of(self, found: _Item) -> list[str]:
        return self._ours(found) + list(found.others)

    def _ours(self, found: _Item) -> list[str]:
        match found.kind:
            case "image":
                users = [f"VM {row.name}" for row in self.rows.values() if row.image == found.name]
                return users + [f"snapshot {one.name}" for one in self.snapshots if one.vm.image == found.name]
            case "medium":
                users = [f"VM {row.name}" for row in self.rows.values() if found.name in _artifacts_of(row.manifest)]
                users += [f"plugin {name}" for name, has in self.plugins.items() if found.name in _artifacts_of(has)]
                has_it = [one.name for one in self.snapshots if found.name in _artifacts_of(one.vm.manifest)]
                return users + [f"snapshot {name}" for name in has_it]
            case "snapshot":
                return [f"snapshot {one.name}" for one in self.snapshots if found.name.startswith(one.checkpoint)]
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


async def usage(doors: VmDoors) -> Usage:
    """What there is, the largest first. :raises OSError: it can't be looked at."""
    found, running = await _look(doors)
    settings = doors.settings
    users = _users(doors, running)
    items = sorted((_shown(one, users) for one in found), key=lambda item: (-item.bytes, item.kind, item.name))
    return Usage(
        items=items[:_MAX_ITEMS],
        total_bytes=sum(item.bytes for item in items),
        reclaimable_bytes=sum(item.bytes for item in items if item.reclaimable),
        state_free_bytes=doors.host.disk.free(doors.store.path.parent),
        cache_free_bytes=doors.host.disk.free(settings.cache_dir),
    )


async def prune(
    doors: VmDoors, kinds: Collection[StoredKind] | None, *, dry_run: bool, unused_for_s: float = 0.0
) -> Pruned:
    """Remove what nobody uses, of these kinds; None: of those that can be had again, or are over. Templates that have
    served within `unused_for_s` stay.

    :raises OSError: it can't be looked at.
    """
    wanted = PRUNED_KINDS if kinds is None else kinds
    unused_since = doors.host.clock.now() - timedelta(seconds=min(unused_for_s, _LONG_S))
    found, running = await _look(doors)
    gone: list[StoredItem] = []
    kept: list[Kept] = []
    for one in found:
        item = _shown(one, _users(doors, running))
        if one.kind not in wanted or not item.reclaimable or (one.used_at and one.used_at > unused_since):
            continue
        if dry_run:
            gone.append(item)
            continue
        try:
            if await _remove(doors, one, running):
                gone.append(item)
            else:
                kept.append(Kept(kind=one.kind, name=one.name, reason="it is in use now"))
        except images.ImageError as error:
            kept.append(Kept(kind=one.kind, name=one.name, reason=error.message))
        except OSError as error:
            kept.append(Kept(kind=one.kind, name=one.name, reason=error.strerror or str(error)))
    return Pruned(dry_run=dry_run, freed_bytes=sum(item.bytes for item in gone), items=gone, kept=kept)


def _users(doors: VmDoors, running: frozenset[int]) -> _Users:
    projection = doors.store.projection
    plugins = {name: plugin.manifest for name, plugin in projection.plugins.items()}
    rows = {row.id: row for row in projection.rows()}
    return _Users(rows, running, plugins, tuple(projection.snapshots.values()))


def _shown(found: _Item, users: _Users) -> StoredItem:
    used_by = users.of(found)
    fixed = found.kind in ("journal", "cache") or found.current
    return StoredItem(
        kind=found.kind,
        name=found.name,
        bytes=found.bytes,
        used_by=used_by,
        reclaimable=not used_by and not fixed,
    )


async def _look(doors: VmDoors) -> tuple[list[_Item], frozenset[int]]:
    host = doors.host
    # The processes last: what one that was launched meanwhile has made is then not taken for nobody's.
    found = await host.threads.run(_scan, doors)
    running = frozenset(each.vm_id for each in await processes_of_vms(host, doors.instance))
    found += await _templates(doors)
    logs = doors.logs.sizes()
    found += [_Item("log", str(vm_id), size, vm_id=vm_id) for vm_id, (size, _) in logs.items()]
    return found, running


async def _templates(doors: VmDoors) -> list[_Item]:
    """Templates, and what is to become one."""
    store = doors.templates
    whole = await store.all()
    names = {path.name: path for path in _in(doors.host, store.directory)}
    sizes = await doors.host.threads.run(lambda: {name: doors.host.disk.used(path) for name, path in names.items()})
    found = []
    for name, size in sizes.items():
        used_at = await store.used_at(name, whole[name]) if name in whole else None
        found.append(_Item("template", name, size, current=name not in whole, used_at=used_at))
    return found


def _scan(doors: VmDoors) -> list[_Item]:
    host, settings, database = doors.host, doors.settings, doors.store.path
    suffixes = ("", "-wal", "-shm", "-reserve", "-acknowledged")
    beside = [database.with_name(database.name + suffix) for suffix in suffixes]
    found = [_Item("journal", database.name, sum(map(host.disk.used, beside)))]
    found += [_Item("database", path.name, host.disk.used(path), path) for path in replaced_databases(database)]
    found += [
        _Item("disk", path.name, host.disk.used(path), path, _id_of(path.name.partition("-")[0]))
        for path in _in(host, settings.disk_dir)
    ]
    found += [_Item("snapshot", path.name, host.disk.used(path), path) for path in _in(host, settings.snapshot_dir)]
    found += [
        _Item("leftover", path.name, host.disk.used(path), path, _id_of(path.name))
        for path in _in(host, settings.runtime_dir / "vms")
    ]
    found += [
        _Item("leftover", path.name, host.disk.used(path), path, _id_of(path.stem))
        for path in _in(host, settings.memory_dir)
        if path.suffix == ".mem"
    ]
    for image in images.list_images(settings.cache_dir):
        others = _others(doors, image.digest)
        found.append(_Item("image", image.digest, image.size_bytes, current=image.current, others=others))
    for artifact in images.list_artifacts(settings.cache_dir):
        others = _others(doors, artifact.digest)
        found.append(_Item("medium", artifact.digest, artifact.disk_bytes, others=others))
    rest = [path for path in _in(host, settings.cache_dir) if path.name not in ("images", "media")]
    found.append(_Item("cache", "packages and indexes", sum(map(host.disk.used, rest))))
    return [one for one in found if one.kind != "leftover" or one.vm_id is not None]


def _others(doors: VmDoors, digest: str) -> tuple[str, ...]:
    own = doors.store.path.parent
    found = images.users(doors.settings.cache_dir, digest)
    return tuple(f"the daemon of {state_dir}" for state_dir in found if state_dir != own)


def _in(host: Host, directory: Path) -> list[Path]:
    return [directory / name for name in host.files.names(directory)] if host.files.exists(directory) else []


def _id_of(text: str) -> int | None:
    return int(text) if text.isdecimal() and len(text) < 19 else None


async def _remove(doors: VmDoors, found: _Item, running: frozenset[int]) -> bool:
    """Whether it is gone. :raises images.ImageError, OSError: it can't be removed."""

    def in_use() -> bool:
        return bool(_users(doors, running).of(found))

    match found.kind:
        case "medium":
            return await doors.artifacts.remove(found.name, in_use=in_use)
        case "image":
            return await doors.host.threads.run(_prune_images, doors, found.name)
        case "log":
            return await doors.logs.discard(found.vm_id or 0)
        case "template":
            if in_use():
                return False
            await doors.templates.remove(found.name)
            return True
        case _:
            if in_use() or found.path is None:
                return False
            await doors.host.files.remove_tree(found.path)
            return True


def _prune_images(doors: VmDoors, digest: str) -> bool:
    """Whether that one is gone; those that were listed as used go, too, if they no longer are: one thing at a time."""
    cache_dir, projection = doors.settings.cache_dir, doors.store.projection
    rows = [*projection.rows(), *(one.vm for one in projection.snapshots.values())]
    keep = {row.image for row in rows if row.image is not None}
    for image in images.list_images(cache_dir):
        if image.digest not in keep:
            images.forget_use(cache_dir, image.digest, doors.store.path.parent)
        if images.users(cache_dir, image.digest):
            keep.add(image.digest)
    return digest in images.prune(cache_dir, keep) or not images.load(cache_dir, digest)
