"""The pool of processes that wait, with a guest that has gone on from a template and stands still, for a VM to take one
over.

`docs/explanation/templates.md` says how a claim goes and what holds when somebody dies in the middle. In short: a
process belongs to the pool until a row is committed that names its tag, and then to that row. Whoever takes one out of
the pool therefore `settle`s it as soon as the row says something else, and what was not claimed is ended.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import trio

from volant.host import Host, ProcessGone, inside
from volant.hypervisor import Disk, HypervisorError, MachineSpec, Nic
from volant.model import ProcessIdentity

from ._ask import TemplateFailed
from ._builder import RESERVE_MB, BuildDoors, unconnected_nic
from ._key import TemplateSpec
from ._store import template_at, template_layer
from ._warm_up import warm_up

_QUIET_S = 0.5
"""What was just claimed has this long for itself."""
_AGAIN_S = 0.5
_AGAIN_MAX_S = 30.0
_HOLD_OFF_S = 60.0
"""A template of which a process has died or did not start has none for so long."""
_KILL_S = 10.0
_CLEAR_S = 8.0
_SWEEP_S = 30.0
_CLAIM = "claim.json"
_MAX_CLAIM = 65536
_logger = logging.getLogger("volant.templates")


class Claim(msgspec.Struct, frozen=True):
    """What the command line of a process that had waited does not say of its VM; it lies in the VM's directory."""

    boot: int
    name: str
    layer: str
    """As the row has it."""
    nic: Nic | None = None


class WarmPoolLimits(msgspec.Struct, frozen=True, kw_only=True):
    """How many may wait."""

    each: int = 0
    """For one template."""
    max_mb: int = 2048
    """Memory of all their guests."""
    idle_s: float = 600.0
    """None is kept for a template that was not used for so long."""


class WarmProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process that waits."""

    tag: str
    digest: str
    identity: ProcessIdentity
    memory_mb: int
    layer: Path | None
    """Its own, to be given the VM's name."""


@dataclass
class Use:
    """That a template serves, and when a VM was made of it last."""

    spec: TemplateSpec
    at: float
    not_before: float = -math.inf

    def idle_at(self, limits: WarmPoolLimits) -> float:
        """When it was not used for so long that none is kept for it. Said in one way alone: what two ways round
        differently would be idle for one of them and not for the other, and whoever waits for it would spin."""
        return self.at + limits.idle_s


@dataclass
class _Figures:
    started: int = 0
    claimed: int = 0
    failed_claims: int = 0
    died: int = 0
    failed_starts: int = 0


def standby_tag_prefix(instance: str) -> str:
    """What the tags of processes begin with that wait, or have waited until a VM took them over."""
    return f"volant-{instance}-s."


def standby_directory(runtime_dir: Path, tag: str) -> Path:
    """Where a process has its sockets while it waits."""
    return inside(runtime_dir / "standby", tag.rpartition(".")[2])


def wanted(uses: Mapping[str, Use], now: float, limits: WarmPoolLimits) -> dict[str, int]:
    """How many should wait for each template; the newest use first, as far as the memory goes."""
    left_mb = limits.max_mb
    found = {}
    for digest, use in sorted(uses.items(), key=lambda each: -each[1].at):
        memory_mb = use.spec.key.memory_mb
        count = min(limits.each, left_mb // memory_mb) if now < use.idle_at(limits) else 0
        if count:
            found[digest] = count
            left_mb -= count * memory_mb
    return found


@dataclass
class WarmPool:
    """The pool of one daemon. `quiet`: whether no VM boots."""

    doors: BuildDoors
    limits: WarmPoolLimits
    quiet: Callable[[], bool]
    warm_up: Callable[[BuildDoors, MachineSpec, ProcessIdentity], Awaitable[None]] = warm_up
    figures: _Figures = field(default_factory=_Figures)
    _uses: dict[str, Use] = field(default_factory=dict)
    _waiting: dict[str, WarmProcess] = field(default_factory=dict)
    """By tag, the oldest first."""
    _watches: dict[str, trio.CancelScope] = field(default_factory=dict)
    _lent: dict[int, WarmProcess] = field(default_factory=dict)
    """By the id of the VM whose boot is being prepared."""
    _doomed: dict[str, tuple[ProcessIdentity | None, int]] = field(default_factory=dict)
    """By tag, what is to be ended: its process if that is known, and the VM for which it was taken, or 0."""
    _taken_at: float = -math.inf
    _wake: trio.Event = field(default_factory=trio.Event)
    _swept: trio.Event = field(default_factory=trio.Event)

    def __post_init__(self) -> None:
        self.doors.store.on_removed = self.forget

    def statistics(self) -> dict[str, object]:
        """Figures, ready for JSON."""
        counts: dict[str, int] = {}
        for each in self._waiting.values():
            counts[each.digest] = counts.get(each.digest, 0) + 1
        figures = {name: getattr(self.figures, name) for name in _Figures.__dataclass_fields__}
        return {"waiting": counts, "memory_mb": sum(each.memory_mb for each in self._waiting.values()), **figures}

    @property
    def tags(self) -> frozenset[str]:
        """Of those that wait."""
        return frozenset(self._waiting)

    def is_one(self, tag: str) -> bool:
        """Whether a process of this tag has waited, or waits."""
        return tag.startswith(standby_tag_prefix(self.doors.instance))

    # For the boot of a VM

    def take(self, vm_id: int, template_spec: TemplateSpec) -> WarmProcess | None:
        """A process for a VM that is to be a clone, if one waits; `settle` follows in any case."""
        if not self.limits.each:
            return None
        use = self._uses.setdefault(template_spec.digest, Use(template_spec, 0.0))
        use.at = self._taken_at = trio.current_time()
        self._wake.set()
        for standby in self._waiting.values():
            if standby.digest == template_spec.digest:
                self._remove(standby)
                self._lent[vm_id] = standby
                return standby
        return None

    def settle(self, vm_id: int, tag: str) -> WarmProcess | None:
        """The row of a VM names this tag: what was taken for it is either that, and given, or is ended."""
        standby = self._lent.pop(vm_id, None)
        if standby is None or standby.tag == tag:
            return standby
        self._doom(standby.tag, standby.identity, vm_id)
        return None

    async def clear(self, vm_id: int) -> None:
        """Return once nothing that was taken for a VM and not claimed has its layer any more. Raises OSError."""
        self.settle(vm_id, "")
        with trio.move_on_after(_SWEEP_S):
            await self._swept.wait()
        for tag, (identity, taker) in [*self._doomed.items()]:
            if taker == vm_id:
                await self._end(tag, identity)

    async def claim(self, spec: MachineSpec, claim: Claim) -> bool:
        """Let a process go on as the VM of `spec`, whose row names its tag; can be repeated. When it can't, it is
        ended: False. Raises OSError where not even that can be done."""
        host = self.doors.host
        self._doomed.pop(spec.tag, None)
        directory = standby_directory(self.doors.runtime_dir, spec.tag)
        try:
            if host.files.exists(directory):
                await host.files.write(directory / _CLAIM, msgspec.json.encode(claim, enc_hook=str))
                await host.files.mkdir(spec.directory.parent)
                await host.files.move_directory(directory, spec.directory)
            await self.doors.hypervisor.resume_warm(spec)
        except (OSError, HypervisorError) as error:
            _logger.warning("%s can't be taken over, an ordinary clone follows: %s", spec.tag, error)
            self.figures.failed_claims += 1
            await self._end(spec.tag, None, claimed=True)
            return False
        self.figures.claimed += 1
        return True

    async def give_way(self) -> bool:
        """A VM lacks memory: nothing waits any more. Whether something did."""
        for standby in [*self._waiting.values()]:
            self._dismiss(standby)
        return await self._end_doomed()

    def forget(self, digest: str) -> None:
        """A template is gone, and so is what waits for it."""
        self._uses.pop(digest, None)
        for standby in [each for each in self._waiting.values() if each.digest == digest]:
            self._dismiss(standby)

    # Keeping it

    async def keep(self) -> None:
        """Keep the pool as it should be, until cancelled; nothing waits then."""
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await self._sweep()
                except OSError as error:
                    _logger.error("processes that waited can't be ended: %s", error)
                self._swept.set()
                again_s = _AGAIN_S
                while True:
                    try:
                        if await self._tend(nursery):
                            again_s = _AGAIN_S
                            continue
                    except OSError as error:
                        # The host is short of descriptors, say. The pool waits; nothing else depends on it.
                        _logger.warning("the warm pool can't be filled now: %s", error)
                    with trio.move_on_after(min(again_s, self._until_idle()) if self.lacks() else self._until_idle()):
                        await self._wake.wait()
                        again_s = _AGAIN_S / 2
                    again_s = min(2 * again_s, _AGAIN_MAX_S)
                    self._wake = trio.Event()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEAR_S):
                for standby in [*self._waiting.values()]:
                    self._dismiss(standby)
                await self._end_doomed()

    async def _tend(self, nursery: trio.Nursery) -> bool:
        """One round: end what is too much, or start one that lacks. Whether there was something to do."""
        now = trio.current_time()
        for digest in [digest for digest, use in self._uses.items() if now >= use.idle_at(self.limits)]:
            del self._uses[digest]
        available_mb = self.doors.host.machine.memory_available_mb()
        have: dict[str, int] = {}
        want = {} if available_mb < RESERVE_MB else wanted(self._uses, now, self.limits)
        for standby in [*self._waiting.values()]:
            have[standby.digest] = have.get(standby.digest, 0) + 1
            if have[standby.digest] > want.get(standby.digest, 0):
                self._dismiss(standby)
        if await self._end_doomed():
            return True
        for digest, count in want.items():
            use = self._uses.get(digest)
            if use is None or have.get(digest, 0) >= count or now < use.not_before:
                continue
            room = available_mb >= use.spec.key.memory_mb + RESERVE_MB
            if room and self._may_start():
                await self._start(use, nursery)
                return True
        return False

    def lacks(self) -> bool:
        """Whether the pool is not as it should be, and looks again by itself."""
        want = wanted(self._uses, trio.current_time(), self.limits)
        return bool(self._doomed) or sum(want.values()) > len(self._waiting)

    def _until_idle(self) -> float:
        idle_at = min((use.idle_at(self.limits) for use in self._uses.values()), default=math.inf)
        return max(0.0, idle_at - trio.current_time())

    async def _start(self, use: Use, nursery: trio.Nursery) -> None:
        host, doors, template_spec = self.doors.host, self.doors, use.spec
        tag = f"{standby_tag_prefix(doors.instance)}{host.random.new_id()[:12]}"
        spec = self._spec(template_spec, tag)
        identity: ProcessIdentity | None = None
        try:
            if spec.root is not None:
                await host.files.mkdir(spec.root.layer.parent)
                await doors.hypervisor.make_layer(
                    spec.root, template_layer(doors.store.directory, template_spec.digest)
                )
            identity = await doors.hypervisor.launch(spec)
            # A workload does not run for as long as it is nobody's.
            if template_spec.key.config is None:
                await self.warm_up(doors, spec, identity)
        except (HypervisorError, TemplateFailed, OSError) as error:
            _logger.warning("no process can wait for template %s: %s", template_spec.digest, error)
            self.figures.failed_starts += 1
            use.not_before = trio.current_time() + _HOLD_OFF_S
            self._doom(tag, identity)
            return
        except BaseException:
            self._doom(tag, identity)
            raise
        self.figures.started += 1
        if self._uses.get(template_spec.digest) is not use:
            self._doom(tag, identity)
            return
        standby = WarmProcess(
            tag=tag,
            digest=template_spec.digest,
            identity=identity,
            memory_mb=template_spec.key.memory_mb,
            layer=None if spec.root is None else spec.root.layer,
        )
        self._waiting[tag] = standby
        self._watches[tag] = scope = trio.CancelScope()
        nursery.start_soon(self._watch, standby, use, scope)

    async def _watch(self, standby: WarmProcess, use: Use, scope: trio.CancelScope) -> None:
        with scope:
            with suppress(ProcessGone), self.doors.host.processes.open(standby.identity) as process:
                await process.wait()
            _logger.warning("process %d, which waited for a VM, has died", standby.identity.pid)
            self.figures.died += 1
            use.not_before = trio.current_time() + _HOLD_OFF_S
            self._dismiss(standby)

    def _spec(self, template_spec: TemplateSpec, tag: str) -> MachineSpec:
        doors, key = self.doors, template_spec.key
        root = None
        if template_spec.rootfs is not None:
            root = Disk(template_spec.rootfs, self._layer(tag), key.disk_mb)
        return MachineSpec(
            vm_id=0,
            name="",
            cpu_cores=key.cpu_cores,
            memory_mb=key.memory_mb,
            kernel=template_spec.kernel,
            initramfs=template_spec.initramfs,
            cmdline=key.cmdline,
            directory=standby_directory(doors.runtime_dir, tag),
            memory_file=doors.memory_dir / "standby.mem",
            tag=tag,
            accelerator=template_spec.accelerator,
            root=root,
            template=template_at(doors.store.directory, template_spec.digest),
            nic=unconnected_nic(key),
            start_paused=True,
        )

    @property
    def _layers(self) -> Path:
        # On the file system of VMs' disks, as one becomes such.
        return self.doors.store.directory.with_name("standby")

    def _layer(self, tag: str) -> Path:
        return inside(self._layers, f"{tag.rpartition('.')[2]}.qcow2")

    def _owned(self, tag: str) -> bool:
        return any(row.tag == tag for row in self.doors.projection.rows())

    def _may_start(self) -> bool:
        rested = trio.current_time() - self._taken_at >= _QUIET_S
        return rested and self.quiet() and self.doors.projection.drain is None

    def _remove(self, standby: WarmProcess) -> None:
        del self._waiting[standby.tag]
        self._watches.pop(standby.tag).cancel()

    def _dismiss(self, standby: WarmProcess) -> None:
        if standby.tag in self._waiting:
            self._remove(standby)
            self._doom(standby.tag, standby.identity)

    def _doom(self, tag: str, identity: ProcessIdentity | None, vm_id: int = 0) -> None:
        self._doomed[tag] = (identity, vm_id)
        self._wake.set()

    async def _end_doomed(self) -> bool:
        """Whether one of them has gone."""
        before = len(self._doomed)

        async def end(tag: str, identity: ProcessIdentity | None) -> None:
            try:
                await self._end(tag, identity)
            except OSError as error:
                _logger.error("what belongs to %s can't be removed: %s", tag, error)

        async with trio.open_nursery() as nursery:
            for tag, (identity, _) in self._doomed.items():
                nursery.start_soon(end, tag, identity)
        return len(self._doomed) < before

    async def _end(self, tag: str, identity: ProcessIdentity | None, *, claimed: bool = False) -> None:
        """Leave nothing of one; what does not go stays doomed. Raises OSError."""
        host = self.doors.host
        # One that a row names is the row's: an actor may fall over while its commit is under way.
        if claimed or not self._owned(tag):
            with trio.move_on_after(_KILL_S) as patience:
                # A look through all processes costs as much as starting one.
                await (host.processes.end_all(tag) if identity is None else host.processes.end([identity]))
            if patience.cancelled_caught:
                raise OSError(f"the process that carries {tag} does not end, although killed")
            await host.files.remove_tree(standby_directory(self.doors.runtime_dir, tag))
            layer = self._layer(tag)
            for path in (layer, layer.with_name(f"{layer.name}.new")):
                await host.files.remove(path)
        self._doomed.pop(tag, None)

    async def _sweep(self) -> None:
        """End what an earlier life has left waiting. Raises OSError."""
        host, directory = self.doors.host, self.doors.runtime_dir / "standby"
        prefix = standby_tag_prefix(self.doors.instance)
        left: dict[str, ProcessIdentity | None] = {}
        for path in (directory, self._layers):
            for name in host.files.names(path) if host.files.exists(path) else []:
                left[f"{prefix}{name.partition('.')[0]}"] = None
        for identity in await host.processes.scan(prefix):
            with suppress(ProcessGone):
                # One that works elsewhere is a VM's, whatever has become of its row.
                if host.proc.working_directory(identity).is_relative_to(directory.resolve()):
                    left[identity.tag] = identity
        taken = {each.tag for each in self._lent.values()}
        for tag, found in left.items():
            if tag not in taken and not self._owned(tag):
                _logger.info("%s waited for a VM, and is ended", tag)
                self._doom(tag, found)
        await self._end_doomed()


async def claim_in(host: Host, directory: Path) -> Claim | None:
    """What was written there when a process was claimed; None: nothing that can be read."""
    try:
        said = await host.files.read(directory / _CLAIM, _MAX_CLAIM)
        return msgspec.json.decode(said, type=Claim, dec_hook=lambda kind, value: kind(value))
    except (OSError, msgspec.DecodeError):
        return None
