"""The door to all VMs: what the API asks, sent to the actor that is concerned."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import msgspec
import trio

from actors import (
    TRANSIENT,
    ActorDown,
    AskTimeout,
    Child,
    DynamicSupervisor,
    GaveUp,
    NameTaken,
    NoSuchChild,
    Ref,
    Request,
)
from volant import images
from volant.channel import AgentClient
from volant.journal import (
    AdoptRow,
    BeginSnapshot,
    CommitSteps,
    CreateRow,
    EndDrain,
    EventCursor,
    EventFrame,
    EventGap,
    ForkRow,
    IdempotencyKey,
    RestoreRow,
    SetDrain,
    StaleRow,
    ask_journal,
)
from volant.model import (
    FORK,
    READY,
    SNAPSHOT,
    BuildTemplate,
    Command,
    CommandRequest,
    CreateVm,
    Desired,
    EventId,
    ForkVm,
    Manifest,
    Problem,
    Reason,
    RestoreVm,
    Snapshot,
    Status,
    Step,
    TakeSnapshot,
    TemplateView,
    VmMemory,
    VmRow,
    check_copyable,
    current_caller,
    draining,
    invalid,
    name_taken,
    new_row,
    no_such_snapshot,
    no_such_vm,
    readiness,
    refused,
    settled,
    size_of,
    view,
)
from volant.templates.messages import Build, ListTemplates, RemoveTemplate

from ._actor import VmActor
from ._checkpoints import CHECKPOINT_S, CheckpointLost
from ._doors import VmDoors
from ._errors import StepError
from ._memory import OVERHEAD_MB, about_to_take_mb, measure, promised_mb
from ._network import is_user, reconnect
from ._orphans import Orphan, find_orphans, kill_orphan, steps_to_adopt
from ._process import LiveProcess
from ._serial import SerialConsole
from ._steps import prepare_artifacts, template_spec_of, uses_image
from .messages import Ask, CheckpointTaken, TakeCheckpoint

R = TypeVar("R")
_logger = logging.getLogger("volant.vm")

_ASK_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 60.0
_SHUTDOWN_S = 10.0
_TELL_AGAIN_S = 1.0
_DELETE_TIMEOUT_S = 60.0
_BUILD_TIMEOUT_S = 300.0
_HOST_RESERVE_MB = 512
"""What the host keeps for itself."""
_DISK_RESERVE_MB = 128
"""What must be left of the disk for the database and the logs."""
_WITH_CONSOLE = frozenset({Status.STARTING, Status.RUNNING, Status.PAUSED, Status.STOPPING})

Wait = Literal["met", "failed", "timeout"]
DELETED: Literal["deleted"] = "deleted"
"""Stands beside the statuses in what can be waited for."""


class Version(NamedTuple):
    """Names one committed state of one VM, whatever has or gets its name."""

    vm_id: int
    revision: int


@dataclass
class Vms:
    """Makes VMs, sends them commands, and finds the way to their agents."""

    doors: VmDoors
    supervisor: DynamicSupervisor
    _refs: dict[int, Ref[VmActor]] = field(default_factory=dict)
    _creating: list[int] = field(default_factory=list)
    _closing: bool = False
    _starting: dict[int, trio.Event] = field(default_factory=dict)

    async def create(self, request: CreateVm, *, key: IdempotencyKey | None = None) -> VmRow:
        """Make a VM; durable when this returns.

        A caller that is cancelled meanwhile cancels nothing.

        :raises Problem: 400 the request, 404 no such plugin, 409 name taken or plugin disabled, 503 no capacity or
            the daemon drains.
        :raises DuplicateRequest: the request came before, and its VM was made then.
        """
        plugin = self.doors.store.projection.plugins.get(request.plugin)
        # Without the plugin the journal refuses the request.
        memory_mb = request.memory_mb or 0
        if plugin is not None:
            memory_mb = size_of(request, plugin.manifest)[1]
            await self._check_memory(memory_mb, plugin.manifest)
        if self.doors.store.projection.get(request.name) is not None:
            # Room would not help.
            raise name_taken(request.name)
        self._check_disk(request)
        with self._making(memory_mb):
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _ASK_TIMEOUT_S):
                row = await self._journal(CreateRow(request, key, current_caller.get()))
                await self._actor(row)
                return row
        raise Problem(503, "journal-slow", "the VM was not made in time; it may still appear", vm=request.name)

    async def restore(self, request: RestoreVm, *, key: IdempotencyKey | None = None) -> VmRow:
        """Make a VM that goes on from a snapshot; durable when this returns. A caller that is cancelled meanwhile
        cancels nothing.

        :raises Problem: 400 the request, 404 no such snapshot, 409 name taken, or it is not ready, 503 no capacity or
            the daemon drains.
        :raises DuplicateRequest: the request came before, and its VM was made then.
        """
        snapshot = self.doors.store.projection.snapshots.get(request.from_snapshot)
        if snapshot is None:
            raise no_such_snapshot(request.from_snapshot, field="from_snapshot")
        if self.doors.store.projection.get(request.name) is not None:
            raise name_taken(request.name)
        with self._making(snapshot.vm.memory_mb):
            with trio.CancelScope(shield=True, deadline=trio.current_time() + _ASK_TIMEOUT_S):
                row = await self._journal(RestoreRow(request, key, current_caller.get()))
                await self._actor(row)
                return row
        raise Problem(503, "journal-slow", "the VM was not made in time; it may still appear", vm=request.name)

    async def fork(self, name: str, request: ForkVm, *, key: IdempotencyKey | None = None) -> tuple[VmRow, ...]:
        """Make VMs that go on from where this one is. When this returns, what they go on from is copied, they are
        durable, and this one goes on itself. A caller that is cancelled meanwhile cancels nothing.

        :raises Problem: 400 the request, 404, 409 it is neither running nor paused, or a name is taken, 503 no
            capacity, it could not be copied, others are being copied, or the daemon drains.
        :raises DuplicateRequest: the request came before, and its VMs were made then.
        """
        row = self._row(name)
        check_copyable(row)
        projection, checkpoints = self.doors.store.projection, self.doors.checkpoints
        # What is known to fail is no reason to stop the guest.
        if projection.drain is not None:
            raise draining(projection.drain, vm=name)
        for copy_name in request.names or ():
            if projection.get(copy_name) is not None:
                raise name_taken(copy_name)

        async def commit(checkpoint: str) -> tuple[VmRow, ...]:
            copies = await self._journal(ForkRow(row.id, request, checkpoint, key, current_caller.get()))
            for copy in copies:
                await self._actor(copy)
            return copies

        with ExitStack() as stack:
            stack.enter_context(self._making(row.memory_mb, len(request.names or ()) or request.count or 1))
            turn = checkpoints.enter(row, FORK)
            turn.held = stack.pop_all()
        checkpoints.start_fork(turn, partial(self._checkpoint, row), commit)
        try:
            await turn.over()
        except CheckpointLost as error:
            raise Problem(503, "fork-failed", f"there is no fork: {error}", vm=name, hint="try again") from error
        return turn.copies

    async def take_snapshot(self, name: str, request: TakeSnapshot, *, key: IdempotencyKey | None = None) -> Snapshot:
        """Copy a VM as it is now, and keep that; all of it is on the disk when this returns. A caller that is cancelled
        meanwhile cancels nothing.

        :raises Problem: 400 the request, 404, 409 it is neither running nor paused, the name is taken, or it could not
            be copied, 503 no capacity, or others are being copied.
        :raises DuplicateRequest: the request came before, and its snapshot was made then.
        """
        row = self._row(name)
        check_copyable(row)
        checkpoints = self.doors.checkpoints
        earlier = self.doors.store.projection.snapshots.get(request.name or "")
        if earlier is not None and earlier.status == "creating" and not checkpoints.is_being_made(earlier.checkpoint):
            # A refusal as a name that is taken would be kept for its key, though there is no such snapshot.
            raise Problem(
                503, "captures-busy", f"what a killed daemon has left of snapshot {earlier.name!r} is being removed",
                vm=name, hint="try again in a moment",
            )  # fmt: skip
        turn = checkpoints.enter(row, SNAPSHOT)
        begun: Snapshot | None = None
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _ASK_TIMEOUT_S):
            try:
                begun = await self._journal(BeginSnapshot(row.id, request, turn.id))
            except BaseException:
                checkpoints.leave(turn)
                raise
            checkpoints.start_snapshot(turn, begun, partial(self._checkpoint, row), key)
        if begun is None:
            raise Problem(503, "journal-slow", "the snapshot was not begun in time", vm=name, hint="try again")
        try:
            await turn.over()
        except CheckpointLost as error:
            raise Problem(503, "snapshot-failed", f"there is no snapshot: {error}", vm=name) from error
        snapshot = self.doors.store.projection.snapshots.get(begun.name)
        if snapshot is None or snapshot.id != begun.id:
            raise no_such_snapshot(begun.name)
        return snapshot

    async def remove_snapshot(self, name: str) -> None:
        """Remove a snapshot; VMs that went on from it keep what they have.

        :raises Problem: 404; 409 a VM has yet to go on from it, or it is being made; 503.
        """
        snapshot = self.doors.store.projection.snapshots.get(name)
        if snapshot is None:
            raise no_such_snapshot(name)
        if snapshot.status != "ready":
            raise Problem(
                409, "snapshot-not-ready", f"snapshot {name!r} is being made", hint="try again once it is `ready`"
            )  # fmt: skip
        try:
            await self.doors.checkpoints.remove(snapshot)
        except OSError as error:
            raise Problem(503, "snapshot-not-removed", f"files of the snapshot can't be removed: {error}") from error

    async def _checkpoint(self, row: VmRow, into: Path) -> CheckpointTaken:
        """Have the actor of a VM copy it. Raises CheckpointFailed, Problem, ActorDown, AskTimeout."""
        ref = await self._actor(row)
        return await ref.ask(TakeCheckpoint(into), timeout_s=3 * CHECKPOINT_S)

    async def apply(
        self,
        name: str,
        request: CommandRequest,
        *,
        only_at: Collection[Version] | None = None,
        key: IdempotencyKey | None = None,
    ) -> VmRow:
        """Change what a VM should be, if it is at one of the versions `only_at`; durable when this returns.

        :raises Problem: 404, 409 not legal now, 412 it is at another version, 503 (among others: it would start, and
            the daemon drains).
        :raises DuplicateRequest: the request came before, and was taken up then.
        """
        row = self._row(name)
        request = msgspec.structs.replace(request, caller=current_caller.get())
        revisions = None
        if only_at is not None:
            revisions = frozenset(version.revision for version in only_at if version.vm_id == row.id)
        drain = self.doors.store.projection.drain
        if drain is not None and _starts(row, request.command):
            raise draining(drain, vm=name)
        refusal = self.doors.store.networking.user_refused
        if refusal and is_user(row) and _starts(row, request.command):
            raise refused(refusal, vm=name)
        if request.command in (Command.START, Command.RESTART) and row.status in (Status.STOPPED, Status.CRASHED):
            self._admit(row.memory_mb, besides=row.id)
        deadline = trio.current_time() + _ASK_TIMEOUT_S
        pause_s = 0.05
        while True:
            ref = await self._actor(row)
            try:
                return await ref.ask(Ask(request, revisions, key), timeout_s=_ASK_TIMEOUT_S)
            except (ActorDown, AskTimeout) as error:
                # It restarts, and may or may not have heard: read the row again, and go on from there.
                after = self.doors.store.projection.by_id(row.id)
                if after is None:
                    if request.command is Command.DELETE:
                        return row
                    raise no_such_vm(name) from error
                if key is None and _holds(after, request.command):
                    return after
                if isinstance(error, AskTimeout) or trio.current_time() + pause_s > deadline:
                    raise Problem(
                        503,
                        "vm-busy",
                        f"VM {name!r} did not take the request up: {error}",
                        vm=name,
                        hint="look at the VM and send it again",
                    ) from error
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, 2.0)

    async def drain(self, stop_grace_s: float | None = None) -> None:
        """Let no VM be made or start, until `undrain`; durable when this returns. Those that are up go on or, with a
        grace, are stopped and start again afterwards (`keep_drained`). :raises Problem: 503."""
        drain = await self._journal(SetDrain(stop_grace_s))
        since = drain.since.strftime("%Y-%m-%d %H:%M:%S UTC")
        _logger.warning("draining since %s: no VM starts until `volar system undrain`", since)

    async def undrain(self) -> None:
        """Let VMs start; those whose time came meanwhile do. :raises Problem: 503."""
        await self._journal(EndDrain())
        _logger.warning("not draining: VMs start")

    async def set_aside(self, row: VmRow, grace_s: float) -> None:
        """Stop a VM that is up and as `row` says; it starts again once the daemon does not drain.

        :raises Problem: 412 it has changed; 503.
        """
        ref = await self._actor(row)
        stop = Ask(CommandRequest(Command.RESTART, grace_s=grace_s, aside=True), frozenset({row.revision}))
        try:
            await ref.ask(stop, timeout_s=_ASK_TIMEOUT_S)
        except (ActorDown, AskTimeout) as error:
            raise Problem(503, "vm-busy", f"VM {row.name!r} did not take it up: {error}", vm=row.name) from error

    async def delete(self, name: str, *, only_at: Collection[Version] | None = None) -> None:
        """Delete a VM, if it is at one of the versions `only_at`, and wait until nothing of it is left on the host.

        A caller that is cancelled meanwhile cancels nothing. A second delete joins the first.

        :raises Problem: 404; 412 it is at another version; 503 after 60 s, and says what is left.
        """
        row = await self.apply(name, CommandRequest(Command.DELETE), only_at=only_at)
        _, after = await self.wait(row.id, {DELETED}, _DELETE_TIMEOUT_S)
        if after is not None:
            reason = f": {after.reason.message}" if after.reason else ""
            raise Problem(
                503,
                "delete-slow",
                f"VM {name!r} is not gone after {_DELETE_TIMEOUT_S:g} s, phase {after.phase.value!r}{reason}",
                vm=name,
                hint="it goes on being deleted; DELETE again to wait on",
            )

    async def wait(
        self, vm_id: int, states: Collection[str], timeout_s: float, *, since: EventId | None = None
    ) -> tuple[Wait, VmRow | None]:
        """Wait until a VM is in one of `states` (`deleted` among them) or comes to rest outside them.

        States that it passed through after the event `since` count too, so that none is too short to be seen.
        """
        store = self.doors.store
        with trio.move_on_after(timeout_s):
            async with store.events.cursor(since if since is not None else store.projection.last_event) as cursor:
                while True:
                    news = self.doors.workload_news.event
                    row = store.projection.by_id(vm_id)
                    if row is None:
                        return ("met" if DELETED in states else "failed"), None
                    if row.status in states:
                        return "met", row
                    if READY in states and (found := readiness(row)) is not None:
                        return found, row
                    if cursor.position.seq >= store.projection.last_event.seq and _came_to_rest(row):
                        return "failed", row
                    taken = await _take_before(cursor, news)
                    if taken is None or isinstance(taken, EventGap):
                        continue
                    if not taken:
                        break
                    if any(frame.event.vm_id == vm_id and frame.event.status in states for frame in taken):
                        return "met", store.projection.by_id(vm_id)
        return "timeout", store.projection.by_id(vm_id)

    def agent(self, name: str) -> AgentClient:
        """The way to the agent of a VM.

        :raises Problem: 404, 409 it does not run, 502 its channel is down, or its agent is too old or too new.
        """
        row = self._row(name)
        if row.status is not Status.RUNNING:
            hints = {
                Status.STARTING: "wait until it runs",
                Status.PAUSED: f"`volar vms resume {name}` lets it go on",
            }
            raise Problem(
                409,
                "vm-not-running",
                f"VM {name!r} is {row.status.value}",
                vm=name,
                hint=hints.get(row.status, f"`volar vms start {name}` starts it"),
            )
        live = self._live(row.id)
        client = live.client if live is not None else None
        if client is None:
            raise Problem(
                502, "agent-unreachable", f"the agent in VM {name!r} can't be reached at present", vm=name,
                hint="its channel is being opened again; try again",
            )  # fmt: skip
        if live is not None and live.incompatible is not None:
            raise Problem(
                502, "agent-incompatible", f"VM {name!r} runs, and can't be talked to: {live.incompatible}", vm=name,
                hint=f"`volar vms restart {name}` boots it with the agent of this version",
            )  # fmt: skip
        return client

    def console(self, name: str) -> tuple[VmRow, SerialConsole]:
        """The serial console of a VM, from its boot's first word to its last.

        :raises Problem: 404, 409 there is no process, 503 nobody holds its console at present.
        """
        row = self._row(name)
        if row.process is None or row.status not in _WITH_CONSOLE:
            raise Problem(
                409, "vm-not-running", f"VM {name!r} is {row.status.value}, and its console is there while it runs",
                vm=name, hint=f"`volar vms logs {name}` shows what it has said; `volar vms start {name}` starts it",
            )  # fmt: skip
        live = self._live(row.id)
        if live is None or not live.console.is_open:
            raise Problem(
                503, "console-unavailable", f"the console of VM {name!r} is being taken up again", vm=name,
                hint="try again",
            )  # fmt: skip
        return row, live.console

    async def memory(self, name: str) -> VmMemory:
        """What a VM takes of memory, measured now. :raises Problem: 404, 409 it has no process, 503."""
        row = self._row(name)
        live = self._live(row.id)
        answers = row.status is Status.RUNNING and live is not None and live.incompatible is None
        return await measure(self.doors.host, row, live.client if live is not None and answers else None)

    def inspect(self, name: str) -> Mapping[str, object]:
        """What is known of a VM for those who look for a fault. :raises Problem: 404."""
        row = self._row(name)
        ref = self._refs.get(row.id)
        # Not the whole row: a workload's environment may hold its secrets.
        return {
            "vm": view(row),
            "phase": row.phase,
            "generation": row.generation,
            "revision": row.revision,
            "image": row.image,
            "mark": row.tag,
            "process": row.process,
            "actor": ref.inspect() if ref is not None else None,
        }

    async def adopt_all(self) -> None:
        """Begin an incarnation for every VM there is, some at a time."""
        limit = trio.CapacityLimiter(8)

        async def adopt(row: VmRow) -> None:
            async with limit:
                try:
                    await self._actor(row)
                except Problem as problem:
                    _logger.error("VM %s is not under control: %s", row.name, problem.detail, extra={"vm": row.name})

        async with trio.open_nursery() as nursery:
            for row in self.doors.store.projection.rows():
                nursery.start_soon(adopt, row)

    async def delete_all(self, timeout_s: float) -> list[str]:
        """Delete every VM and make no more; the names of those that are left after `timeout_s`."""
        self._closing = True
        projection = self.doors.store.projection
        with trio.move_on_after(timeout_s):
            # One that was being made when this began has its row a moment later.
            while projection.rows() or self._creating:
                async with trio.open_nursery() as nursery:
                    for row in projection.rows():
                        nursery.start_soon(self._delete_quietly, row.name)
                    nursery.start_soon(trio.sleep, 0.05)
        return [row.name for row in projection.rows()]

    async def orphans(self) -> list[Orphan]:
        """Hypervisors of this daemon's that no VM owns, by id. Looks through all processes."""
        return await find_orphans(self.doors)

    async def adopt_orphan(self, tag: str, name: str | None = None) -> VmRow:
        """Make a VM of one; durable when this returns. `name`: instead of its own.

        :raises Problem: 404; 409 it can't be adopted, or the name is taken; 503.
        """
        steps = await steps_to_adopt(self.doors, tag, name)
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _ASK_TIMEOUT_S):
            row = await self._journal(AdoptRow(steps))
            # What was to be forgotten with the database that knew it.
            await self.doors.logs.recall([row.id])
            await self._actor(row)
            _logger.info("VM %s: %s", row.name, steps[0].message, extra={"vm": row.name})
            await reconnect(self.doors, row)
            return row
        raise Problem(503, "journal-slow", "the VM was not adopted in time; it may still appear")

    async def kill_orphan(self, tag: str) -> None:
        """End one and remove its files; its disk stays. :raises Problem: 404, 503."""
        await kill_orphan(self.doors, tag)
        _logger.warning("the hypervisor %s, which no VM owned, is killed", tag)

    async def templates(self) -> tuple[TemplateView, ...]:
        """All templates, those that are being built, and those that could not be. :raises Problem: 503."""
        return await self._builder(ListTemplates())

    async def build_template(self, request: BuildTemplate) -> TemplateView:
        """The template that VMs made like this begin with, once it is there. A caller that is cancelled meanwhile
        cancels nothing.

        :raises Problem: 400; 404 no such plugin; 409 there are no templates here; 503 it can't be built.
        """
        plugin = self.doors.store.projection.plugins.get(request.plugin)
        if plugin is None:
            raise Problem(404, "plugin-not-found", f"there is no plugin named {request.plugin[:80]!r}")
        like = CreateVm(
            name="template",
            cpu_cores=request.cpu_cores,
            memory_mb=request.memory_mb,
            plugin=request.plugin,
            kernel_cmdline=request.kernel_cmdline,
            env=request.env,
            disk_mb=request.disk_mb,
            network=request.network,
        )
        now, networking = self.doors.host.clock.now(), self.doors.store.networking
        row = new_row(like, plugin.manifest, vm_id=0, now=now, networking=networking)
        try:
            image = await prepare_artifacts(self.doors, row)
            template_spec = await template_spec_of(self.doors, row, image)
        except (StepError, OSError) as error:
            raise Problem(503, "template-failed", f"the template can't be built: {error}") from error
        return await self._builder(Build(template_spec), self.doors.settings.agent_timeout_s + _BUILD_TIMEOUT_S)

    async def remove_template(self, digest: str) -> None:
        """Remove a template; VMs that began as its clones go on. :raises Problem: 404, 503."""
        await self._builder(RemoveTemplate(digest))

    async def _builder(self, message: Request[R], timeout_s: float = _ASK_TIMEOUT_S) -> R:
        """Ask who keeps the templates. :raises Problem: its own, or 503 when it does not answer."""
        try:
            return await self.doors.builder.ask(message, timeout_s=timeout_s)
        except (ActorDown, AskTimeout) as error:
            raise Problem(503, "templates-down", f"who keeps the templates does not answer: {error}") from error

    async def gave_up(self, told: GaveUp) -> None:
        """The supervisor has given up a VM's actor: the VM goes on, and its row says that nobody holds the reins; once
        the journal can keep that, as far as the supervisor waits for it."""
        row = self.doors.store.projection.get(told.name)
        if row is None:
            return
        self._refs.pop(row.id, None)
        reason = Reason("control_lost", f"its actor keeps failing: {str(told.reason).splitlines()[0]}")
        text = "VM %s: control is lost; `volar vms recover %s` tries again: %s"
        _logger.error(text, row.name, row.name, told.reason, extra={"vm": row.name})
        while row is not None and row.id not in self._refs:
            lost = msgspec.structs.replace(row, reason=reason)
            try:
                await self._journal(CommitSteps(row.id, row.revision, (Step(lost, reason.message),)))
                return
            except (Problem, StaleRow):
                await trio.sleep(_TELL_AGAIN_S)
            row = self.doors.store.projection.by_id(row.id)

    async def _delete_quietly(self, name: str) -> None:
        try:
            await self.apply(name, CommandRequest(Command.DELETE, grace_s=0))
            await self.delete(name)
        except Problem as problem:
            if problem.status != 404:
                _logger.error("VM %s: %s", name, problem.detail, extra={"vm": name})

    async def _check_memory(self, memory_mb: int, manifest: Manifest) -> None:
        """:raises Problem: 400 when the boot image says that it needs more. One that is not built yet says so later."""
        settings = self.doors.settings
        if not uses_image(settings, manifest):
            return
        image = await self.doors.host.threads.run(images.find, settings.cache_dir)
        if image is not None and memory_mb < image.min_memory_mb:
            raise invalid(
                "memory_mb", f"memory_mb {memory_mb} is too little: the boot image needs at least {image.min_memory_mb}"
            )

    @contextmanager
    def _making(self, memory_mb: int, count: int = 1) -> Iterator[None]:
        """The block in which so many VMs of that size get their rows. :raises Problem: 503 the host has no room."""
        made: list[int] = []
        try:
            for _ in range(count):
                self._admit(memory_mb)
                # Counted at once, as others ask while the journal writes.
                self._creating.append(memory_mb)
                made.append(memory_mb)
            yield
        finally:
            for each in made:
                self._creating.remove(each)

    def _admit(self, memory_mb: int, *, besides: int | None = None) -> None:
        """:raises Problem: 503 when the host has no room for one more VM of that size, or all are being deleted."""
        if self._closing:
            raise Problem(503, "daemon-stopping", "the daemon stops, and its VMs with it")
        rows = [row for row in self.doors.store.projection.rows() if row.id != besides]
        limit = self.doors.settings.max_vms
        if limit is not None and len(rows) + len(self._creating) >= limit:
            raise Problem(
                503, "no-capacity", f"there are {len(rows)} VMs, and VOLANT_MAX_VMS allows {limit}",
                hint="delete one, or raise the limit",
            )  # fmt: skip
        needed = memory_mb + OVERHEAD_MB
        total, available = self.doors.host.machine.memory_total_mb(), self.doors.host.machine.memory_available_mb()
        promised = promised_mb(rows) + sum(mb + OVERHEAD_MB for mb in self._creating)
        unpromised = max(0, total - _HOST_RESERVE_MB - promised)
        if needed > unpromised:
            raise Problem(
                503, "no-capacity",
                f"the VM needs {needed} MiB, and {unpromised} of the host's {total} MiB are not promised yet: "
                f"{promised} MiB are promised to VMs that are up or about to be, and {_HOST_RESERVE_MB} MiB are kept "
                f"for the host ({available} MiB are available now, as VMs do not use all that is promised to them)",
                hint="stop or delete a VM, or ask for less memory_mb",
            )  # fmt: skip
        if self.doors.warm_pool.tags:
            # They give way, and what they take is more than what is missing.
            return
        # What others than VMs have taken is not to be had, whatever was promised to nobody.
        spare = self.doors.host.machine.spare_memory_mb(self.doors.settings.memory_dir)
        spare -= about_to_take_mb(rows) + sum(mb + OVERHEAD_MB for mb in self._creating)
        spare = max(0, spare)
        if needed > spare:
            raise Problem(
                503, "no-capacity",
                f"the VM needs {needed} MiB, and {spare} of the host's {total} MiB can be had now: {available} MiB are "
                f"available, and VMs that are up or about to be may take {max(0, available - spare)} MiB of these; the "
                f"rest is used by them and by other programs ({promised} MiB are promised to VMs)",
                hint="stop or delete a VM, end other programs, or ask for less memory_mb",
            )  # fmt: skip

    def _check_disk(self, request: CreateVm) -> None:
        """:raises Problem: 503 when the host's disk has no room for the VM's."""
        plugin = self.doors.store.projection.plugins.get(request.plugin)
        boot = plugin.manifest.boot if plugin is not None else None
        if boot is None or boot.rootfs is None:
            return
        directory = self.doors.settings.disk_dir
        try:
            free_mb = self.doors.host.disk.free(directory) // 2**20
        except OSError as error:
            raise Problem(503, "no-capacity", f"{directory} can't be looked at: {error.strerror}") from error
        needed_mb = (request.disk_mb or 0) + _DISK_RESERVE_MB
        if needed_mb > free_mb:
            raise Problem(
                503, "no-capacity",
                f"the VM's disk may take {request.disk_mb or 'some'} MiB, and {free_mb} MiB are left in {directory}, "
                f"of which {_DISK_RESERVE_MB} are the daemon's own",
                hint="delete a VM or a snapshot, make room, or ask for less disk_mb",
            )  # fmt: skip

    async def _journal(self, message: Request[R]) -> R:
        """Returns the journal's answer. :raises Problem: as `ask_journal`."""
        return await ask_journal(self.doors.journal, message)

    def _row(self, name: str) -> VmRow:
        row = self.doors.store.projection.get(name)
        if row is None:
            raise no_such_vm(name)
        return row

    def _live(self, vm_id: int) -> LiveProcess | None:
        return self.doors.live.get(vm_id)

    async def _actor(self, row: VmRow) -> Ref[VmActor]:
        """The ref of a VM's actor, which is started if there is none.

        :raises Problem: 503 it can't be started.
        """
        ref = self._refs.get(row.id)
        while ref is None and (starting := self._starting.get(row.id)) is not None:
            await starting.wait()
            ref = self._refs.get(row.id)
        if ref is not None:
            return ref
        done = self._starting[row.id] = trio.Event()
        try:
            return await self._start(row)
        except Exception as error:
            raise Problem(
                503,
                "vm-lost",
                f"VM {row.name!r} is not under control: {error}",
                vm=row.name,
                hint="`volantd`'s log says why its actor does not start",
            ) from error
        finally:
            del self._starting[row.id]
            done.set()

    async def _start(self, row: VmRow) -> Ref[VmActor]:
        for vm_id in self._refs.keys() - {row.id for row in self.doors.store.projection.rows()}:
            del self._refs[vm_id]
        child = Child(
            row.name,
            partial(VmActor, row.id, self.doors),
            TRANSIENT,
            start_timeout_s=_START_TIMEOUT_S,
            shutdown_s=_SHUTDOWN_S,
        )
        try:
            ref = await self.supervisor.start_child(child)
        except NameTaken:
            # A deleted VM had that name, and its actor is about to end.
            with suppress(NoSuchChild):
                await self.supervisor.stop_child(row.name)
            ref = await self.supervisor.start_child(child)
        self._refs[row.id] = ref
        return ref


async def _take_before(cursor: EventCursor, news: trio.Event) -> list[EventFrame] | EventGap | None:
    """What the cursor takes next; None: the event `news` came first."""
    taken: list[EventFrame] | EventGap | None = None
    async with trio.open_nursery() as nursery:

        async def wait() -> None:
            await news.wait()
            nursery.cancel_scope.cancel()

        nursery.start_soon(wait)
        taken = await cursor.take()
        nursery.cancel_scope.cancel()
    return taken


def _came_to_rest(row: VmRow) -> bool:
    """Whether nothing more will happen to a VM that does not run (contract: Waiting)."""
    return row.status in (Status.STOPPED, Status.CRASHED) and settled(row)


def _starts(row: VmRow, command: Command) -> bool:
    """Whether a command wants another boot than the one that is."""
    if command is Command.RESTART:
        return row.status is not Status.DELETING
    return command is Command.START and row.status in (Status.STOPPED, Status.CRASHED, Status.STOPPING)


def _holds(row: VmRow, command: Command) -> bool:
    """Whether a command whose answer was lost has been committed."""
    match command:
        case Command.STOP:
            return row.desired is Desired.STOPPED
        case Command.START:
            return row.desired is Desired.RUNNING and row.generation > row.booted
        case Command.PAUSE:
            return row.desired is Desired.PAUSED
        case Command.DELETE:
            return row.desired is Desired.DELETED
        case _:
            return False
