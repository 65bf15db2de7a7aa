"""The actor of one VM: receives observations, lets `decide` decide, commits, and runs the step that the row then needs.
`docs/explanation/vm.md` has the reasons."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import partial

import msgspec
import trio

from actors import Actor, ActorDown, AskTimeout, Deferred, TaskHandle, handles
from volant.channel import AgentProtocolError, AgentUnreachable
from volant.concurrency import Backoff
from volant.host import ProcessGone
from volant.hypervisor import CheckpointFailed, HypervisorError
from volant.journal import CommitSteps, DuplicateRequest, IdempotencyKey, StaleRow, journal_down
from volant.logs import LogEntry
from volant.model import (
    MAX_RESTARTS,
    VOLUME_REFUSALS,
    Command,
    CommandRequest,
    Effect,
    Ended,
    Hold,
    Kill,
    Launched,
    Phase,
    Problem,
    ProcessIdentity,
    Reason,
    Remove,
    Resume,
    Resumed,
    Seen,
    Status,
    Step,
    StepFailed,
    VmRow,
    Woke,
    check_copyable,
    decide,
    effect_of,
    is_copyable,
)
from volant.session import AgentSession, Peers, guest_secrets

from ._deps import VmDeps
from ._machine_spec import guest_manifest, guest_volumes, machine_spec, nameservers_of, uses_passt, workload_spec
from ._process import VmProcess
from ._steps import Steps, VmState
from .messages import CHECKPOINT_S, Ask, CheckpointTaken, Report, TakeCheckpoint

_COMMIT_S = 30.0
_COMMIT_TRIES = 4
_COMMIT_PAUSE_S, _COMMIT_PAUSE_MAX_S = 0.1, 0.4
_LAUNCH_ALONE_S = 1.0
_REPORT_S, _REPORT_MAX_S = 0.1, 5.0
_STEP_S, _STEP_MAX_S = 1.0, 60.0
_MEASURE_AGAIN_S = 1.0
_HISTORY = 20
_HISTORY_CHARACTERS = 200
_logger = logging.getLogger("volant.vm")


class VmActor(Actor):
    """One incarnation of the actor of a VM, whose row is in the journal."""

    _vm: VmState
    _steps: Steps

    def __init__(self, vm_id: int, deps: VmDeps) -> None:
        self._vm_id = vm_id
        self._deps = deps
        self._gone = False
        self._effect: Effect | None = None
        self._step: TaskHandle | None = None
        self._step_began = 0.0
        self._checkpoint: TaskHandle | None = None
        """The copy that is being made."""
        self._launched: tuple[Launched, datetime] | None = None
        self._launch_steps: tuple[Step, ...] = ()
        """The changes of `_launched` to the row of this actor, which are committed with the next observation."""
        self._adopted_tag = ""
        """The process tag of a boot that an earlier incarnation began."""
        self._history: deque[dict[str, object]] = deque(maxlen=_HISTORY)

    async def on_start(self) -> None:
        deps = self._deps
        row = deps.store.projection.by_id(self._vm_id)
        if row is None:
            raise LookupError(f"there is no VM with the id {self._vm_id}")
        self._vm = VmState(row, deps.logs.open(row.id, row.key))
        self._steps = Steps(deps, self._vm)
        self._adopted_tag = row.tag
        self.ctx.stack.callback(deps.processes.pop, row.id, None)
        self.ctx.stack.callback(deps.slots.release, row.id)
        self.ctx.stack.callback(lambda: deps.warm_pool.settle(self._vm_id, self._vm.row.tag))
        found = await self._find(row)
        woke = Woke(found, row.process is not None and row.process.boot_id != deps.host.processes.boot_id())
        try:
            await self._see(woke)
        except Problem as problem:
            # A full disk must not leave a VM without an actor: nobody would start it once there is space.
            _logger.warning("VM %s: %s; trying again", row.name, problem, extra={"vm": row.name})
            self.ctx.spawn(self._deliver, Report(woke, row.tag), name="woke")
        if row.expires_at is not None:
            self.ctx.spawn(self._expire, name="ttl")

    # Messages

    @handles(Ask)
    async def ask(self, message: Ask) -> VmRow:
        await self._see(message.request, message.revisions, message.key)
        return self._vm.row

    @handles(Report)
    async def report(self, message: Report) -> None:
        row = self._vm.row
        if message.effect != self._effect if message.effect is not None else message.tag != row.tag:
            return
        if isinstance(message.seen, Launched):
            if row.phase is Phase.LAUNCH:
                self._launched = message.seen, self._deps.host.clock.now()
                self._take(row)
                self._remember(message.seen)
                self._drive()
                self.ctx.spawn(self._commit_launch, message, name="launched")
                return
            if self._launched is None:
                return
        await self._see(message.seen)
        before, row = row, self._vm.row
        templates = self._deps.templates
        templates.note_clone(before, row, adopted=before.tag == self._adopted_tag)
        if templates.is_wanted(before, row):
            self.ctx.spawn(templates.want, row, name="template")
        if before.workload != row.workload:
            self._note_workload(row)

    @handles(TakeCheckpoint)
    async def checkpoint(self, message: TakeCheckpoint) -> Deferred[CheckpointTaken]:
        deferred = self.ctx.defer(message)
        try:
            check_copyable(self._vm.row, volumes=message.volumes is not None)
        except Problem as problem:
            deferred.fail(problem)
            return deferred
        if self._checkpoint is not None and not self._checkpoint.done:
            deferred.fail(CheckpointFailed("refused", "it is being copied already"))
        else:
            self._checkpoint = self.ctx.spawn(self._copy, message, deferred, name="checkpoint")
        return deferred

    def inspect(self) -> Mapping[str, object]:
        row, process = self._vm.row, self._vm.process
        return {
            "status": row.status,
            "desired": row.desired,
            "phase": row.phase,
            "revision": row.revision,
            "step": self._inspect_step(),
            "turn": self._deps.slots.inspect(self._vm_id),
            "template": row.template,
            "being_copied": self._checkpoint is not None and not self._checkpoint.done,
            "restarts": {"policy": row.restart_policy, "done": row.restarts, "limit": MAX_RESTARTS},
            "history": list(self._history),
            "process": None if process is None else process.inspect(),
            "log": self._vm.log.statistics(),
            "artifacts": self._deps.preparation.inspect(),
        }

    def _inspect_step(self) -> dict[str, object] | None:
        if self._effect is None:
            return None
        took_s, limit_s = trio.current_time() - self._step_began, self._steps.limit_s(self._effect)
        return {
            "name": type(self._effect).__name__,
            "since_s": round(took_s, 3),
            "limit_s": limit_s,
            "left_s": None if limit_s is None else round(max(0.0, limit_s - took_s), 3),
        }

    # The loop

    async def _see(
        self, seen: Seen, revisions: frozenset[int] | None = None, key: IdempotencyKey | None = None
    ) -> None:
        """Handles one observation: decides, commits, and starts the step that the row then needs. :raises Problem: as
        `Ask`. :raises DuplicateRequest:"""
        seen = self._without_directories(seen)
        vm, deps, projection = self._vm, self._deps, self._deps.store.projection
        unsure = False
        backoff = Backoff(_COMMIT_PAUSE_S, _COMMIT_PAUSE_MAX_S)
        for tries_left in reversed(range(_COMMIT_TRIES)):
            now = deps.host.clock.now()
            steps = (*self._launch_steps, *decide(vm.row, seen, now, held=self._is_held()))
            # An unconfirmed commit of this loop may have made the row what was asked for.
            if revisions is not None and vm.row.revision not in revisions and (steps or not unsure):
                raise _changed(vm.row)
            if not steps and key is None:
                break
            cause = seen.cause if isinstance(seen, CommandRequest) else None
            try:
                row = await deps.journal.ask(
                    CommitSteps(self._vm_id, vm.row.revision, steps, key, cause), timeout_s=_COMMIT_S
                )
            except DuplicateRequest:
                # Perhaps by an unconfirmed commit of this loop.
                self._take(projection.by_id(self._vm_id) or vm.row)
                self._drive()
                raise
            except Problem as problem:
                if problem.code not in VOLUME_REFUSALS:
                    raise
                # It is about to be launched, and another VM has a volume of it.
                seen = StepFailed(Reason(problem.code.replace("-", "_"), problem.detail))
                continue
            except (ActorDown, AskTimeout, StaleRow) as error:
                if not tries_left:
                    raise journal_down(error) from error
                unsure = unsure or not isinstance(error, StaleRow)
                await backoff.pause()
                # The commit may have succeeded: read the row again, and continue from there.
                row = projection.by_id(self._vm_id)
                if row is not None:
                    self._take(row)
                    continue
            self._launched = None
            if row is None:
                self._gone = True
            else:
                self._take(row)
            break
        if not isinstance(seen, Launched):
            self._remember(seen)
        self._drive()

    def _take(self, row: VmRow) -> None:
        """Takes a committed row, and applies the uncommitted launch to it."""
        self._launch_steps = () if self._launched is None else decide(row, *self._launched)
        self._vm.row = (self._launch_steps[-1].row if self._launch_steps else None) or row

    async def _commit_launch(self, report: Report) -> None:
        """Commits a launch after a delay, so that clients see the process of a guest that boots slowly."""
        await trio.sleep(_LAUNCH_ALONE_S)
        await self._deliver(msgspec.structs.replace(report, effect=None))

    def _is_held(self) -> bool:
        """Whether no boot may begin now."""
        deps = self._deps
        row = self._vm.row
        may_run = row.leaving is None and (row.movable is None or deps.fence.is_open)
        return deps.store.projection.drain is not None or not may_run

    def _drive(self) -> None:
        """Makes the running step the wanted one, and watches the process that the row has."""
        row, deps = self._vm.row, self._deps
        if self._gone:
            self._watch(None)
            self.ctx.stop()
            return
        self._watch(row)
        if row.phase is not Phase.IMAGE:
            self._vm.warm_process = deps.warm_pool.settle(self._vm_id, row.tag) or self._vm.warm_process
        if row.phase in (Phase.LAUNCH, Phase.AGENT):
            deps.slots.of(row.template).force(self._vm_id)
        elif row.phase is not Phase.IMAGE:
            deps.slots.release(self._vm_id)
        wanted = effect_of(row)
        if wanted == self._effect:
            return
        before, copying = self._step, self._checkpoint
        if before is not None:
            before.cancel()
        if copying is not None and not is_copyable(row):
            # The wanted step begins once the guest continues.
            copying.cancel()
        self._effect = wanted
        self._step_began = trio.current_time()
        self._step = None
        if wanted is not None:
            self._step = self.ctx.spawn(self._perform, wanted, (before, copying), name=type(wanted).__name__)

    async def _perform(self, effect: Effect, before: tuple[TaskHandle | None, ...]) -> None:
        """Runs one step after the tasks `before` have ended, and reports its outcome.

        A failed kill, removal or resume is retried as long as the VM needs it. So is the wait for the end of a drain,
        as another drain may have begun.
        """
        for task in before:
            if task is not None:
                await task.wait()
        backoff = Backoff(_STEP_S, _STEP_MAX_S)
        while True:
            seen = await self._steps.run(effect)
            await self._deliver(Report(seen, self._vm.row.tag, effect))
            done = not isinstance(effect, Kill | Remove | Resume) or not isinstance(seen, StepFailed)
            if done and not isinstance(effect, Hold):
                return
            await backoff.pause()

    async def _deliver(self, report: Report) -> None:
        """Sends a report to this actor, and repeats it while the journal can't store it."""
        backoff = Backoff(_REPORT_S, _REPORT_MAX_S)
        while True:
            try:
                return await self.ctx.self_ref.ask(report, timeout_s=2 * _COMMIT_S)
            except ActorDown:
                # The next incarnation sees for itself.
                return
            except (Problem, AskTimeout) as error:
                name = self._vm.row.name
                _logger.warning("VM %s: %s; trying again in %.1f s", name, error, backoff.next_s, extra={"vm": name})
            await backoff.pause()

    async def _expire(self) -> None:
        """Deletes the VM at the end of its `ttl`."""
        assert self._vm.row.expires_at is not None
        # The wall clock may be set, so no sleep is longer than a minute.
        while True:
            left_s = (self._vm.row.expires_at - self._deps.host.clock.now()).total_seconds()
            if left_s <= 0:
                break
            await trio.sleep(min(left_s, 60.0))
        backoff = Backoff(_REPORT_S, _REPORT_MAX_S)
        while True:
            with suppress(Problem, AskTimeout):
                await self.ctx.self_ref.ask(Ask(CommandRequest(Command.DELETE)), timeout_s=2 * _COMMIT_S)
                return
            await backoff.pause()

    def _without_directories(self, seen: Seen) -> Seen:
        """Returns an observation with a reason that all clients may read. The log has the complete reason."""
        if not isinstance(seen, Resumed | StepFailed | Ended) or seen.reason is None:
            return seen
        message = self._deps.settings.without_directories(seen.reason.message)
        if message == seen.reason.message:
            return seen
        name = self._vm.row.name
        _logger.warning("VM %s: %s: %s", name, seen.reason.code, seen.reason.message, extra={"vm": name})
        return msgspec.structs.replace(seen, reason=msgspec.structs.replace(seen.reason, message=message))

    def _remember(self, seen: Seen) -> None:
        """Stores an observation for `inspect`."""
        what = type(seen).__name__
        if isinstance(seen, CommandRequest):
            what = f"{what}: {seen.command}"
        elif isinstance(seen, StepFailed | Ended):
            what = f"{what}: {seen.reason.code}: {seen.reason.message}"
        row = self._vm.row
        self._history.append(
            {
                "at": self._deps.host.clock.now(),
                "saw": what[:_HISTORY_CHARACTERS],
                "status": row.status,
                "phase": row.phase,
                "generation": row.generation,
            }
        )

    # The process

    async def _find(self, row: VmRow) -> ProcessIdentity | None:
        """Finds the process of the row. A process that the row names is checked alone: reading all of /proc for each of
        a thousand VMs would take half a minute."""
        host = self._deps.host
        if row.process is not None:
            with suppress(ProcessGone), host.processes.open(row.process) as process:
                if not process.exited:
                    return row.process
        return await host.processes.find(row.tag) if row.tag else None

    def _watch(self, row: VmRow | None) -> None:
        """Watches the row's process and no other; no process if the row has none."""
        vm, deps = self._vm, self._deps
        identity = row.process if row is not None else None
        if vm.process is not None and vm.process.identity != identity:
            assert vm.process_task is not None
            vm.process_task.cancel()
            vm.process = vm.process_task = None
            deps.processes.pop(self._vm_id, None)
        if identity is not None and row is not None and vm.process is None:
            process = vm.process = deps.processes[self._vm_id] = self._new_process(row, identity)
            beside: list[Callable[[], Awaitable[None]]] = []
            if uses_passt(row):
                beside.append(partial(deps.networks.keep_passt, row, process.machine))
            if row.directories:
                beside.append(partial(self._watch_directories, row, process))
            vm.process_task = self.ctx.spawn(process.run, beside, name="process")

    async def _watch_directories(self, row: VmRow, process: VmProcess) -> None:
        await process.report_lost_directory(await self._deps.virtiofsd.lost(row))

    def _new_process(self, row: VmRow, identity: ProcessIdentity) -> VmProcess:
        deps, log, tag = self._deps, self._vm.log, row.tag
        spec = machine_spec(deps.settings, row, row.accelerator or "tcg")
        paused = row.phase is Phase.PAUSE or (row.status is Status.PAUSED and row.phase is Phase.NONE)

        async def report(seen: Seen) -> None:
            await self._deliver(Report(seen, tag))

        agent = AgentSession(
            deps.host,
            spec,
            log,
            row.boot_key,
            report,
            # The configuration of an adopted orphan's guest is unknown.
            manifest=None if row.boots == row.found_boot else guest_manifest(row),
            workload=workload_spec(row),
            volumes=() if row.boots == row.found_boot else guest_volumes(row),
            secrets=guest_secrets(deps.secrets, row, deps.instance),
            signal=row.manifest.template.signal,
            peers=Peers(deps.store.projection, row, nameservers_of(row, deps.settings.nameservers)),
            limits=deps.limits,
            configured=row.agent_seen,
            is_clone=row.template is not None,
            paused=paused,
            take_link=partial(deps.warm_pool.take_link, tag),
        )
        return VmProcess(
            deps.host,
            deps.hypervisor,
            spec,
            identity,
            log,
            row.boot_key,
            report,
            agent,
            paused=paused,
            take_control=partial(deps.warm_pool.take_control, tag),
            fence=None if row.movable is None else deps.fence,
        )

    def _note_workload(self, row: VmRow) -> None:
        """Wakes the tasks that wait for a healthy workload, and writes a failure into the VM's log."""
        self._deps.workload_changed.send()
        if row.workload is not None and row.workload.state == "failed":
            text = f"volant: the workload has failed: {row.workload.error}"
            entry = LogEntry(
                stream="stderr",
                line=text.encode(errors="replace"),
                timestamp=self._deps.host.clock.now(),
                source=f"{row.boot_key}/workload",
                position=row.revision,
            )
            self._vm.log.append([entry])

    # Checkpoints

    async def _copy(self, message: TakeCheckpoint, deferred: Deferred[CheckpointTaken]) -> None:
        """Copies the guest. Cancelled when the VM should be in another state."""
        try:
            with trio.fail_after(2 * CHECKPOINT_S):
                process = self._vm.running_process()
                checkpoint = await process.checkpoint(message.into, message.volumes, CHECKPOINT_S)
                deferred.reply(CheckpointTaken(checkpoint, process.agent.protocol))
            self.ctx.spawn(self._catch_up, checkpoint.paused_s, name="clock")
        except CheckpointFailed as error:
            deferred.fail(error)
            self.ctx.spawn(self._catch_up, 0.0, name="clock")
        except (AgentUnreachable, HypervisorError, trio.TooSlowError) as error:
            deferred.fail(CheckpointFailed("refused", str(error) or "the hypervisor does not answer"))
        finally:
            deferred.fail(CheckpointFailed("refused", "the VM was to be something else, or its guest has ended"))

    async def _catch_up(self, paused_s: float) -> None:
        """Sets the clock of a guest that was paused for a checkpoint, unless it still is. First the clock is moved by
        the length of the pause, in one request. Once the guest's copies have begun, it is corrected by the time that it
        shows."""
        try:
            process = self._vm.running_process()
            if paused_s and not process.paused:
                # An agent that is too old for a step is only sent the time.
                with suppress(AgentProtocolError):
                    await process.agent.clock.step(paused_s)
                    await trio.sleep(_MEASURE_AGAIN_S)
                process = self._vm.running_process()
            if not process.paused:
                await process.agent.clock.set()
        except (AgentUnreachable, AgentProtocolError) as error:
            name = self._vm.row.name
            _logger.info("VM %s: its clock may be behind: %s", name, error, extra={"vm": name})


def _changed(row: VmRow) -> Problem:
    return Problem(
        412, "vm-changed", f"VM {row.name!r} has changed", vm=row.name,
        hint="read it again, and send its ETag as If-Match",
    )  # fmt: skip
