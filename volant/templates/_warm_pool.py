"""The warm pool: processes restored from a template and paused, until a VM claims one.

`docs/explanation/templates.md` describes a claim, and the death of a daemon or an actor in the middle. In short: a
process belongs to the pool until a row with its tag is committed, and then to that row. So a boot that takes one out of
the pool calls `settle` with the tag in its row, and an unclaimed process is ended.
"""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from volant.channel import ParkedLink
from volant.concurrency import Backoff
from volant.host import Host, ProcessGone, ResourceLimits, inside
from volant.hypervisor import Hypervisor, HypervisorError, MachineSpec, Nic, ParkedControl
from volant.journal import Projection
from volant.model import ProcessIdentity

from ._builder import RESERVE_MB, machine_of
from ._demand import Use, WarmPoolLimits, pause_s, wanted
from ._guest import TemplateFailed
from ._key import TemplateSpec
from ._store import TemplateStore, template_at, template_layer
from ._warm_up import Connections, warm_up

_LOOK_S = 10.0
"""The interval of checks of the host's memory while a template is in use."""
_RETRY_S, _RETRY_MAX_S = 0.5, 30.0
_HOLD_OFF_S = 60.0
"""The pause after a process of a template died or did not start; for the whole pool, after programs waited for
memory."""
_KILL_S = 10.0
_CLEAR_S = 8.0
_SWEEP_S = 30.0
_CLAIM = "claim.json"
_MAX_CLAIM_BYTES = 65536
_logger = logging.getLogger("volant.templates")

WarmUp = Callable[[Host, Hypervisor, MachineSpec, ProcessIdentity], Awaitable[Connections | None]]


class Claim(msgspec.Struct, frozen=True):
    """The data of a claimed process's VM that is not in its command line, stored in the VM's directory."""

    boot: int
    name: str
    layer: str
    """See the row."""
    nic: Nic | None = None


class WarmProcess(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the pool."""

    tag: str
    digest: str
    identity: ProcessIdentity
    memory_mb: int
    layer: Path | None
    """Renamed to the VM's layer."""


class _Figures(msgspec.Struct):
    started: int = 0
    claimed: int = 0
    missed: int = 0
    failed_claims: int = 0
    died: int = 0
    failed_starts: int = 0


def standby_tag_prefix(instance: str) -> str:
    """Returns the prefix of the process tags of warm processes, including claimed ones."""
    return f"volant-{instance}-s."


def standby_directory(runtime_dir: Path, tag: str) -> Path:
    """Returns the directory of a process's sockets until it is claimed."""
    return inside(runtime_dir / "standby", tag.rpartition(".")[2])


class WarmCounts(msgspec.Struct):
    """The results of the pool for the clones of one template, since the daemon started."""

    hits: int = 0
    misses: int = 0


class WarmPool:
    """The warm pool of one daemon."""

    def __init__(
        self,
        host: Host,
        hypervisor: Hypervisor,
        store: TemplateStore,
        projection: Projection,
        limits: WarmPoolLimits,
        *,
        instance: str,
        runtime_dir: Path,
        memory_dir: Path,
        quiet: Callable[[], bool],
        bounds: Callable[[MachineSpec], ResourceLimits],
        warm_up: WarmUp = warm_up,
    ) -> None:
        """Creates it. `quiet` returns whether no VM boots; `bounds` returns a VM's limits for its process."""
        self.limits = limits
        self.quiet = quiet
        self.figures = _Figures()
        self._host = host
        self._hypervisor = hypervisor
        self._store = store
        self._projection = projection
        self._instance = instance
        self._runtime_dir = runtime_dir
        self._memory_dir = memory_dir
        self._bounds = bounds
        self._warm_up = warm_up
        self._layers = store.directory.with_name("standby")
        """The directory of their layers, on the file system of VMs' disks, as each becomes one."""
        self._uses: dict[str, Use] = {}
        self._waiting: dict[str, WarmProcess] = {}
        """Unclaimed processes by tag, oldest first."""
        self._watches: dict[str, trio.CancelScope] = {}
        self._connections: dict[str, Connections] = {}
        """The connections to warm processes by tag, until the VM ends."""
        self._taken: dict[int, WarmProcess] = {}
        """Taken processes by the id of the VM whose boot is being prepared."""
        self._doomed: dict[str, tuple[ProcessIdentity | None, int]] = {}
        """Processes to end, by tag: the process if known, and the VM for which it was taken, or 0."""
        self._takes: deque[float] = deque([-math.inf, -math.inf], maxlen=2)
        """When the last clones of any template began."""
        self._available_mb = 0
        """The memory at the last check."""
        self._not_before = -math.inf
        """The earliest time to fill the pool again."""
        self.counts: dict[str, WarmCounts] = {}
        """Counts by template."""
        self._wake = trio.Event()
        self._swept = trio.Event()
        store.on_removed = self.forget

    def statistics(self) -> dict[str, object]:
        """Returns statistics, ready for JSON."""
        counts = Counter(each.digest for each in self._waiting.values())
        figures = msgspec.structs.asdict(self.figures)
        return {"waiting": counts, "memory_mb": sum(each.memory_mb for each in self._waiting.values()), **figures}

    @property
    def tags(self) -> frozenset[str]:
        """The tags of the processes that may be claimed."""
        return frozenset(self._waiting)

    def waiting(self, digest: str) -> int:
        """Returns the number of claimable processes of a template."""
        return sum(each.digest == digest for each in self._waiting.values())

    def is_one(self, tag: str) -> bool:
        """Returns whether the process with this tag is or was a warm process."""
        return tag.startswith(standby_tag_prefix(self._instance))

    # For the boot of a VM

    def take(self, vm_id: int, spec: TemplateSpec) -> WarmProcess | None:
        """Takes a process for a VM that is to be a clone, if there is one. `settle` must follow in any case."""
        if self.limits.each == 0:
            return None
        now = trio.current_time()
        self._uses.setdefault(spec.digest, Use(spec)).note(now)
        self._takes.append(now)
        self._wake.set()
        counts = self.counts.setdefault(spec.digest, WarmCounts())
        for process in self._waiting.values():
            if process.digest == spec.digest:
                self._remove(process)
                self._taken[vm_id] = process
                counts.hits += 1
                return process
        counts.misses += 1
        self.figures.missed += 1
        return None

    def expect(self, spec: TemplateSpec) -> None:
        """Prepares for clones of a template that has just been built for a VM or a client."""
        if self.limits.each != 0:
            self._uses.setdefault(spec.digest, Use(spec)).note(trio.current_time())
            self._wake.set()

    def settle(self, vm_id: int, tag: str) -> WarmProcess | None:
        """Records the tag in a VM's row. Returns the process taken for the VM if it has that tag, otherwise ends it."""
        process = self._taken.pop(vm_id, None)
        if process is None or process.tag == tag:
            return process
        self._doom(process.tag, process.identity, vm_id)
        return None

    async def clear(self, vm_id: int) -> None:
        """Waits until no process that was taken for a VM and not claimed has its layer open. :raises OSError:"""
        self.settle(vm_id, "")
        with trio.move_on_after(_SWEEP_S):
            await self._swept.wait()
        for tag, (identity, taker) in [*self._doomed.items()]:
            if taker == vm_id:
                await self._end(tag, identity)

    async def claim(self, spec: MachineSpec, claim: Claim) -> bool:
        """Lets a process continue as the VM of `spec`, whose row has its tag. Can be repeated.

        Returns False if the process can't continue and was ended. :raises OSError: it can't be ended.
        """
        host = self._host
        self._doomed.pop(spec.tag, None)
        directory = standby_directory(self._runtime_dir, spec.tag)
        try:
            if host.files.exists(directory):
                # A power cut ends the process, too.
                data = msgspec.json.encode(claim, enc_hook=str)
                await host.files.write(directory / _CLAIM, data, durable=False)
                if not host.files.exists(spec.directory.parent):
                    await host.files.mkdir(spec.directory.parent)
                await host.files.move_directory(directory, spec.directory)
            await self._hypervisor.resume_warm(spec, self._connections_of(spec.tag).control)
        except (OSError, HypervisorError) as error:
            _logger.warning("%s can't be claimed, an ordinary clone follows: %s", spec.tag, error)
            self.figures.failed_claims += 1
            await self._end(spec.tag, None, claimed=True)
            return False
        self.figures.claimed += 1
        return True

    def take_link(self, tag: str) -> ParkedLink | None:
        """Returns the link to the agent of a claimed process and gives it up; None if there is none."""
        return self._connections_of(tag).take_link()

    def take_control(self, tag: str) -> ParkedControl | None:
        """Returns the connection to the hypervisor of a claimed process and gives it up; None if there is none."""
        return self._connections_of(tag).take_control()

    async def disconnect(self, tag: str) -> None:
        """Closes the unused connections to a process."""
        await self._connections.pop(tag, Connections()).aclose()

    def _connections_of(self, tag: str) -> Connections:
        return self._connections.get(tag) or Connections()

    async def give_way(self) -> bool:
        """Empties the pool, as a VM lacks memory. Returns whether there was a process to end."""
        for process in [*self._waiting.values()]:
            self._dismiss(process)
        return await self._end_doomed()

    def forget(self, digest: str) -> None:
        """Ends the processes of a removed template."""
        self._uses.pop(digest, None)
        self.counts.pop(digest, None)
        for process in [each for each in self._waiting.values() if each.digest == digest]:
            self._dismiss(process)

    # Keeping it

    async def keep(self) -> None:
        """Keeps the pool filled until cancelled, and empties it then."""
        try:
            async with trio.open_nursery() as nursery:
                try:
                    await self._sweep()
                except OSError as error:
                    _logger.error("warm processes of an earlier daemon can't be ended: %s", error)
                self._swept.set()
                backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
                while True:
                    try:
                        if await self._tend(nursery):
                            backoff.reset()
                            continue
                    except OSError as error:
                        # The host is short of descriptors, say. The pool waits; nothing else depends on it.
                        _logger.warning("the warm pool can't be filled now: %s", error)
                    retry_s = backoff.take() if self.lacks() else math.inf
                    with trio.move_on_after(min(retry_s, self._until_next_look())):
                        await self._wake.wait()
                        backoff.reset()
                    self._wake = trio.Event()
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLEAR_S):
                for process in [*self._waiting.values()]:
                    self._dismiss(process)
                await self._end_doomed()

    def lacks(self) -> bool:
        """Returns whether the pool lacks processes and will retry by itself."""
        # Also while the host is short of memory: that passes.
        return bool(self._doomed) or sum(self._demand().values()) > len(self._waiting)

    def _look_at_memory(self) -> None:
        """Checks the host's memory. :raises OSError: the host is short of descriptors."""
        machine = self._host.machine
        self._available_mb = machine.memory_available_mb()
        if machine.is_short_of_memory():
            self._not_before = trio.current_time() + _HOLD_OFF_S

    def _wanted(self) -> dict[str, int]:
        """Returns how many processes each template should have now; none while the host is short of memory."""
        if self._available_mb < RESERVE_MB or trio.current_time() < self._not_before:
            return {}
        return self._demand()

    def _demand(self) -> dict[str, int]:
        held_mb = sum(each.memory_mb for each in self._waiting.values())
        return wanted(self._uses, trio.current_time(), self.limits, self._available_mb + held_mb)

    async def _tend(self, nursery: trio.Nursery) -> bool:
        """Ends surplus processes, or starts a missing one. Returns whether there was something to do."""
        now = trio.current_time()
        for digest in [digest for digest, use in self._uses.items() if now >= use.idle_at(self.limits)]:
            del self._uses[digest]
        self._look_at_memory()
        have: dict[str, int] = {}
        want = self._wanted()
        for process in [*self._waiting.values()]:
            have[process.digest] = have.get(process.digest, 0) + 1
            if have[process.digest] > want.get(process.digest, 0):
                self._dismiss(process)
        if await self._end_doomed():
            return True
        for digest, count in want.items():
            use = self._uses.get(digest)
            if use is None or have.get(digest, 0) >= count or now < use.not_before:
                continue
            has_room = self._available_mb >= use.spec.key.memory_mb + RESERVE_MB
            if has_room and self._may_start():
                await self._start(use, nursery)
                return True
        return False

    def _may_start(self) -> bool:
        is_quiet = trio.current_time() - self._takes[-1] >= pause_s(*self._takes)
        return is_quiet and self.quiet() and self._projection.drain is None

    def _until_next_look(self) -> float:
        """Returns the seconds until a template is idle, or the next check of the host's memory."""
        idle_at = min((use.idle_at(self.limits) for use in self._uses.values()), default=math.inf)
        return min(max(0.0, idle_at - trio.current_time()), _LOOK_S if self._uses else math.inf)

    async def _start(self, use: Use, nursery: trio.Nursery) -> None:
        host, hypervisor, wanted = self._host, self._hypervisor, use.spec
        tag = f"{standby_tag_prefix(self._instance)}{host.random.new_id()[:12]}"
        spec = self._machine(wanted, tag)
        identity: ProcessIdentity | None = None
        try:
            if spec.root is not None:
                await host.files.mkdir(spec.root.layer.parent)
                await hypervisor.make_layer(spec.root, template_layer(self._store.directory, wanted.digest))
            identity = await hypervisor.launch(spec)
            # Now and not in the claim, as it takes long. They are those of a VM with this template.
            description = f"warm VM of template {wanted.digest[:12]}"
            await host.limits.apply(identity, description, self._bounds(spec), expendable=True)
            # A workload does not run before it belongs to a VM.
            if wanted.key.config is None:
                connections = await self._warm_up(host, hypervisor, spec, identity)
                if connections is not None:
                    self._connections[tag] = connections
        except (HypervisorError, TemplateFailed, OSError) as error:
            _logger.warning("no warm process for template %s: %s", wanted.digest, error)
            self.figures.failed_starts += 1
            use.not_before = trio.current_time() + _HOLD_OFF_S
            self._doom(tag, identity)
            return
        except BaseException:
            self._doom(tag, identity)
            raise
        self.figures.started += 1
        if self._uses.get(wanted.digest) is not use:
            self._doom(tag, identity)
            return
        process = WarmProcess(
            tag=tag,
            digest=wanted.digest,
            identity=identity,
            memory_mb=wanted.key.memory_mb,
            layer=None if spec.root is None else spec.root.layer,
        )
        self._waiting[tag] = process
        self._watches[tag] = scope = trio.CancelScope()
        nursery.start_soon(self._watch, process, use, scope)

    async def _watch(self, process: WarmProcess, use: Use, scope: trio.CancelScope) -> None:
        with scope:
            why = "has died"
            try:
                with suppress(ProcessGone), self._host.processes.open(process.identity) as opened:
                    await opened.wait()
            except OSError as error:
                # The host is short of descriptors, say.
                why = f"can't be watched, and is ended: {error}"
            _logger.warning("the warm process %d %s", process.identity.pid, why)
            self.figures.died += 1
            use.not_before = trio.current_time() + _HOLD_OFF_S
            self._dismiss(process)

    def _machine(self, wanted: TemplateSpec, tag: str) -> MachineSpec:
        machine = machine_of(
            wanted,
            directory=standby_directory(self._runtime_dir, tag),
            memory_file=self._memory_dir / "standby.mem",
            tag=tag,
            layer=self._layer(tag),
        )
        template = template_at(self._store.directory, wanted.digest)
        return msgspec.structs.replace(machine, template=template, start_paused=True)

    def _layer(self, tag: str) -> Path:
        return inside(self._layers, f"{tag.rpartition('.')[2]}.qcow2")

    # Ending them

    def _remove(self, process: WarmProcess) -> None:
        del self._waiting[process.tag]
        self._watches.pop(process.tag).cancel()

    def _dismiss(self, process: WarmProcess) -> None:
        if process.tag in self._waiting:
            self._remove(process)
            self._doom(process.tag, process.identity)

    def _doom(self, tag: str, identity: ProcessIdentity | None, vm_id: int = 0) -> None:
        self._doomed[tag] = (identity, vm_id)
        self._wake.set()

    async def _end_doomed(self) -> bool:
        """Ends doomed processes. Returns whether one has ended."""
        before = len(self._doomed)

        async def end(tag: str, identity: ProcessIdentity | None) -> None:
            try:
                await self._end(tag, identity)
            except OSError as error:
                _logger.error("the warm process %s can't be ended: %s", tag, error)

        async with trio.open_nursery() as nursery:
            for tag, (identity, _) in self._doomed.items():
                nursery.start_soon(end, tag, identity)
        return len(self._doomed) < before

    async def _end(self, tag: str, identity: ProcessIdentity | None, *, claimed: bool = False) -> None:
        """Ends a process and removes its files. If it does not end, it stays doomed. :raises OSError:"""
        host = self._host
        # A process that a row names belongs to the row: an actor may fall over while its commit is under way.
        if claimed or not self._is_owned(tag):
            await self.disconnect(tag)
            with trio.move_on_after(_KILL_S) as scope:
                # Reading all of /proc costs as much as a launch.
                await (host.processes.end_all(tag) if identity is None else host.processes.end([identity]))
            if scope.cancelled_caught:
                raise OSError(f"the process with the tag {tag} does not end, although killed")
            await host.limits.remove_empty(tag)
            await host.files.remove_tree(standby_directory(self._runtime_dir, tag))
            layer = self._layer(tag)
            for path in (layer, layer.with_name(f"{layer.name}.new")):
                await host.files.remove(path)
        self._doomed.pop(tag, None)

    def _is_owned(self, tag: str) -> bool:
        return any(row.tag == tag for row in self._projection.rows())

    async def _sweep(self) -> None:
        """Ends the processes that an earlier daemon left in its pool. :raises OSError:"""
        host, directory = self._host, self._runtime_dir / "standby"
        prefix = standby_tag_prefix(self._instance)
        left: dict[str, ProcessIdentity | None] = {}
        for path in (directory, self._layers):
            for name in host.files.names(path) if host.files.exists(path) else []:
                left[f"{prefix}{name.partition('.')[0]}"] = None
        for identity in await host.processes.scan(prefix):
            with suppress(ProcessGone):
                # One that works elsewhere belongs to a VM, whatever has become of its row.
                if host.proc.working_directory(identity).is_relative_to(directory.resolve()):
                    left[identity.tag] = identity
        taken = {each.tag for each in self._taken.values()}
        for tag, found in left.items():
            if tag not in taken and not self._is_owned(tag):
                _logger.info("the warm process %s of an earlier daemon is ended", tag)
                self._doom(tag, found)
        await self._end_doomed()


async def claim_in(host: Host, directory: Path) -> Claim | None:
    """Returns the claim of the process in a VM's directory; None if there is none, or it can't be read."""
    try:
        data = await host.files.read(directory / _CLAIM, _MAX_CLAIM_BYTES)
        return msgspec.json.decode(data, type=Claim, dec_hook=lambda kind, value: kind(value))
    except (OSError, ValueError):
        return None
