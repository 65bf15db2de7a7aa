"""The actor of one VM: it sees, lets `decide` decide, commits, and runs the one step that the row then needs.

`docs/explanation/vm.md` says why it is so.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import trio

from actors import Actor, ActorDown, AskTimeout, Deferred, MailboxFull, TaskHandle, handles
from volant.channel import AgentProtocolError, AgentUnreachable
from volant.host import ProcessGone
from volant.hypervisor import CheckpointFailed, HypervisorError, LaunchFailed, MachineSpec
from volant.journal import CommitSteps, DuplicateRequest, IdempotencyKey, LogEntry, StaleRow, journal_down
from volant.model import (
    MAX_RESTARTS,
    AgentAnswered,
    AskStop,
    AwaitAgent,
    Cleared,
    Command,
    CommandRequest,
    Effect,
    Ended,
    Hold,
    ImageReady,
    Kill,
    Launch,
    Launched,
    Pause,
    Paused,
    Phase,
    PrepareImage,
    Problem,
    ProcessIdentity,
    Reason,
    Released,
    Remove,
    Removed,
    RestartDue,
    RestartLater,
    Resume,
    Resumed,
    Seen,
    Status,
    StepFailed,
    VmRow,
    Woke,
    check_copyable,
    decide,
    effect_of,
    is_checkpoint,
    is_copyable,
)
from volant.model.agent import DAEMON_SHUTDOWN, HEALTHZ
from volant.templates import Claim, WarmProcess, standby_directory, template_layer
from volant.templates.messages import GiveWay, Suspect, Wanted

from ._boot_limiter import SLOT_S
from ._checkpoints import CHECKPOINT_S, LAYER
from ._console import ConsolePump
from ._doors import VmDoors
from ._errors import StepError
from ._network import Neighbours, attach, attach_anew, detach, is_user, keep_user_network, note_connected
from ._process import LiveProcess, RootFailed
from ._steps import (
    guest_manifest,
    layer_directory,
    machine_id,
    machine_spec,
    prepare_boot,
    tag_of,
    template_spec_of,
    workload_spec,
)
from .messages import Ask, CheckpointTaken, Report, TakeCheckpoint

_logger = logging.getLogger("volant.vm")

_COMMIT_TIMEOUT_S = 30.0
_COMMIT_TRIES = 4
_REPORT_PAUSE_MAX_S = 5.0
_AGENT_PAUSE_S = 0.05
_AGAIN_S = 1.0
_AGAIN_MAX_S = 60.0
_PAUSE_S = 45.0
"""A guest is stopped once its disk has all that it has written."""
_RESUME_S = 60.0
"""Its clock, for which its agent has to answer, included."""
_CLONE_S = 30.0
_MEASURE_AGAIN_S = 1.0
"""How long a clone may take until it is somebody; a cold boot follows then, so it is not the agent's patience."""
_GIVE_WAY_S = 10.0
_TEMPLATES_FAULT = frozenset(
    {"template_refused", "clone_refused", "clone_timeout", "guest_panicked", "guest_reset", "hypervisor_exited"}
)
"""What is wrong with a clone that is not wrong with the host."""
_HISTORY = 20
_HISTORY_CHARACTERS = 200


class VmActor(Actor):
    """One VM. Its row is in the journal; this is an incarnation of what drives it."""

    _row: VmRow

    def __init__(self, vm_id: int, doors: VmDoors) -> None:
        self._vm_id = vm_id
        self._doors = doors
        self._gone = False
        self._effect: Effect | None = None
        self._step: TaskHandle | None = None
        self._step_began = 0.0
        self._history: deque[dict[str, object]] = deque(maxlen=_HISTORY)
        self._process: LiveProcess | None = None
        self._process_task: TaskHandle | None = None
        self._checkpoint: TaskHandle | None = None
        """The copy that is being made."""
        self._fresh_tag = ""
        """Of a process to come that nobody can have started yet."""
        self._adopted_tag = ""
        """Of the process of a boot that an earlier incarnation has begun."""
        self._standby: WarmProcess | None = None
        """The process that this boot has taken over."""

    async def on_start(self) -> None:
        row = self._doors.store.projection.by_id(self._vm_id)
        if row is None:
            raise LookupError(f"there is no VM with the id {self._vm_id}")
        self._row = row
        self._adopted_tag = row.tag
        self._log = self._doors.logs.open(row.id, row.name)
        self.ctx.stack.callback(self._doors.live.pop, row.id, None)
        self.ctx.stack.callback(self._release_slots)
        self.ctx.stack.callback(lambda: self._doors.warm_pool.settle(self._vm_id, self._row.tag))
        found = await self._find(row)
        rebooted = row.process is not None and row.process.boot_id != self._doors.host.processes.boot_id()
        try:
            await self._see(Woke(found, rebooted))
        except Problem as problem:
            # A full disk must not leave a VM without an actor, as nobody would come back to it once there is space.
            _logger.warning("VM %s: %s; trying again", row.name, problem, extra={"vm": row.name})
            self.ctx.spawn(self._deliver, Report(Woke(found, rebooted), row.tag), name="woke")
        if row.expires_at is not None:
            self.ctx.spawn(self._expire, name="ttl")

    @handles(Ask)
    async def ask(self, message: Ask) -> VmRow:
        await self._see(message.request, message.revisions, message.key)
        return self._row

    @handles(TakeCheckpoint)
    async def checkpoint(self, message: TakeCheckpoint) -> Deferred[CheckpointTaken]:
        deferred = self.ctx.defer(message)
        try:
            check_copyable(self._row)
        except Problem as problem:
            deferred.fail(problem)
            return deferred
        if self._checkpoint is not None and not self._checkpoint.done:
            deferred.fail(CheckpointFailed("refused", "it is being copied already"))
        else:
            self._checkpoint = self.ctx.spawn(self._copy, message.into, deferred, name="checkpoint")
        return deferred

    async def _copy(self, into: Path, deferred: Deferred[CheckpointTaken]) -> None:
        """Copy the guest; cancelled when it is to be something else."""
        try:
            with trio.fail_after(2 * CHECKPOINT_S):
                process = self._live()
                checkpoint = await process.checkpoint(into, CHECKPOINT_S)
                deferred.reply(CheckpointTaken(checkpoint, process.protocol))
            self.ctx.spawn(self._catch_up, checkpoint.paused_s, name="clock")
        except CheckpointFailed as error:
            deferred.fail(error)
            self.ctx.spawn(self._catch_up, 0.0, name="clock")
        except (AgentUnreachable, HypervisorError, trio.TooSlowError) as error:
            deferred.fail(CheckpointFailed("refused", str(error) or "the hypervisor does not answer"))
        finally:
            deferred.fail(CheckpointFailed("refused", "the VM was to be something else, or its guest has ended"))

    async def _catch_up(self, paused_s: float) -> None:
        """Set the clock of a guest that stood still while it was copied, unless it still does: by how long that was, if
        it is known, and when its copies have begun, by what it shows."""
        try:
            process = self._live()
            if paused_s and not process.stands_still:
                # An agent that is too old for a step is told the time.
                with suppress(AgentProtocolError):
                    await process.step_clock(paused_s)
                    await trio.sleep(_MEASURE_AGAIN_S)
                process = self._live()
            if not process.stands_still:
                await process.set_clock()
        except (AgentUnreachable, AgentProtocolError) as error:
            _logger.info("VM %s: its clock may be behind: %s", self._row.name, error, extra={"vm": self._row.name})

    @handles(Report)
    async def report(self, message: Report) -> None:
        current = message.effect == self._effect if message.effect is not None else message.tag == self._row.tag
        if current:
            before = self._row
            await self._see(message.seen)
            self._tell_builder(before, self._row)
            if before.workload != self._row.workload:
                self._note_workload(self._row)

    def _note_workload(self, row: VmRow) -> None:
        """Say in the VM's log that its workload has failed, and let those look who wait for it to be well."""
        self._doors.workload_news.announce()
        workload = row.workload
        if workload is not None and workload.state == "failed":
            text = f"volant: the workload has failed: {workload.error}"
            self._log.append(
                [
                    LogEntry(
                        stream="stderr",
                        line=text.encode(errors="replace"),
                        timestamp=self._doors.host.clock.now(),
                        source=f"{row.boot_key}/workload",
                        position=row.revision,
                    )
                ]
            )

    def _tell_builder(self, before: VmRow, after: VmRow) -> None:
        """What a boot says of templates: one that should be there, one that served, one that did not."""
        doors = self._doors
        if before.status is not Status.STARTING or before.checkpoint is not None:
            return
        failed = after.fallback if after.status is Status.STARTING else after.reason
        if after.status is Status.RUNNING:
            if after.template is not None:
                doors.templates.count_clone(after.template)
            elif after.boot == "auto" and doors.templates.enabled:
                self.ctx.spawn(self._want_template, after, name="template")
        elif before.template is not None and failed is not None and failed is not before.fallback:
            if after.status is Status.STARTING:
                doors.store.figures.fallbacks[failed.code] += 1
                _logger.warning(
                    "VM %s boots cold, as the clone of template %s failed: %s: %s",
                    after.name, before.template, failed.code, failed.message, extra={"vm": after.name},
                )  # fmt: skip
            # What went wrong around an adoption is no fault of the template's.
            if failed.code in _TEMPLATES_FAULT and before.tag != self._adopted_tag:
                self._tell(Suspect(before.template, f"{failed.code}: {failed.message}"))

    async def _want_template(self, row: VmRow) -> None:
        with suppress(OSError):
            template_spec = await template_spec_of(self._doors, row, row.image or "")
            if await self._doors.templates.find(template_spec.key, template_spec.digest) is None:
                self._tell(Wanted(template_spec))

    def _tell(self, message: Wanted | Suspect) -> None:
        # Lost, it is told again by the next VM.
        with suppress(ActorDown, MailboxFull):
            self._doors.builder.tell(message)

    def inspect(self) -> Mapping[str, object]:
        process = self._process
        return {
            "status": self._row.status,
            "desired": self._row.desired,
            "phase": self._row.phase,
            "revision": self._row.revision,
            "step": self._inspect_step(),
            "turn": self._doors.boot_slots.inspect(self._vm_id) or self._doors.clone_slots.inspect(self._vm_id),
            "template": self._row.template,
            "being_copied": self._checkpoint is not None and not self._checkpoint.done,
            "restarts": {"policy": self._row.restart_policy, "done": self._row.restarts, "limit": MAX_RESTARTS},
            "history": list(self._history),
            "process": None if process is None else process.inspect(),
            "log": self._log.statistics(),
            "artifacts": self._doors.artifacts.inspect(),
        }

    async def _find(self, row: VmRow) -> ProcessIdentity | None:
        """The process that the row owns. One that the row knows is looked at alone: a look through all processes for
        each of a thousand VMs would take half a minute."""
        host = self._doors.host
        if row.process is not None:
            with suppress(ProcessGone), host.processes.open(row.process) as process:
                if not process.exited:
                    return row.process
        return await host.processes.find(row.tag) if row.tag else None

    def _inspect_step(self) -> dict[str, object] | None:
        if self._effect is None:
            return None
        took_s, limit_s = trio.current_time() - self._step_began, self._limit_s(self._effect)
        return {
            "name": type(self._effect).__name__,
            "since_s": round(took_s, 3),
            "limit_s": limit_s,
            "left_s": None if limit_s is None else round(max(0.0, limit_s - took_s), 3),
        }

    def _limit_s(self, effect: Effect) -> float | None:
        """How long a step may take; None: its parts have limits of their own, or it waits for somebody."""
        settings = self._doors.settings
        match effect:
            case Launch():
                return settings.launch_timeout_s
            case AwaitAgent():
                return settings.agent_timeout_s
            case Pause():
                return _PAUSE_S
            case Resume():
                return _RESUME_S
            case AskStop(grace_s=grace_s):
                return grace_s
            case Kill():
                return settings.kill_timeout_s
            case RestartLater(delay_s):
                return delay_s
            case _:
                return None

    def _remember(self, seen: Seen) -> None:
        """Keep what was seen, and what the VM was then, for `inspect`."""
        what = type(seen).__name__
        if isinstance(seen, CommandRequest):
            what = f"{what}: {seen.command}"
        elif isinstance(seen, StepFailed | Ended):
            what = f"{what}: {seen.reason.code}: {seen.reason.message}"
        self._history.append(
            {
                "at": self._doors.host.clock.now(),
                "saw": what[:_HISTORY_CHARACTERS],
                "status": self._row.status,
                "phase": self._row.phase,
                "generation": self._row.generation,
            }
        )

    # One thing seen at a time

    async def _see(
        self, seen: Seen, revisions: frozenset[int] | None = None, key: IdempotencyKey | None = None
    ) -> None:
        unsure = False
        projection = self._doors.store.projection
        for tries_left in reversed(range(_COMMIT_TRIES)):
            steps = decide(self._row, seen, self._doors.host.clock.now(), held=projection.drain is not None)
            # A commit of which nobody knows may have made the row what it is, if that is what was wanted.
            if revisions is not None and self._row.revision not in revisions and (steps or not unsure):
                raise _changed(self._row)
            if not steps and key is None:
                break
            try:
                row = await self._doors.journal.ask(
                    CommitSteps(
                        self._vm_id,
                        self._row.revision,
                        steps,
                        key,
                        seen.caller if isinstance(seen, CommandRequest) else None,
                    ),
                    timeout_s=_COMMIT_TIMEOUT_S,
                )
            except DuplicateRequest:
                # Perhaps by a commit of this very loop, of which nobody knew.
                self._row = projection.by_id(self._vm_id) or self._row
                self._drive()
                raise
            except (ActorDown, AskTimeout, StaleRow) as error:
                if not tries_left:
                    raise journal_down(error) from error
                unsure = unsure or not isinstance(error, StaleRow)
                await trio.sleep(0.2)
                # Whether it was kept is unknown: read the row again, and go on from there.
                row = projection.by_id(self._vm_id)
                if row is not None:
                    self._row = row
                    continue
            if row is None:
                self._gone = True
            else:
                self._row = row
            break
        self._remember(seen)
        self._drive()

    def _drive(self) -> None:
        """Make the running step the wanted one, and watch the process that the row has."""
        if self._gone:
            self._watch(None)
            self.ctx.stop()
            return
        self._watch(self._row)
        if self._row.phase is not Phase.IMAGE:
            self._standby = self._doors.warm_pool.settle(self._vm_id, self._row.tag) or self._standby
        if self._row.phase in (Phase.LAUNCH, Phase.AGENT):
            (self._doors.boot_slots if self._row.template is None else self._doors.clone_slots).force(self._vm_id)
        elif self._row.phase is not Phase.IMAGE:
            self._release_slots()
        wanted = effect_of(self._row)
        if wanted == self._effect:
            return
        before = self._step
        if before is not None:
            before.cancel()
        copying = self._checkpoint
        if copying is not None and not is_copyable(self._row):
            # What is wanted now begins once the guest goes on.
            copying.cancel()
        self._effect = wanted
        self._step_began = trio.current_time()
        self._step = (
            None
            if wanted is None
            else self.ctx.spawn(self._perform, wanted, (before, copying), name=type(wanted).__name__)
        )

    def _release_slots(self) -> None:
        self._doors.boot_slots.release(self._vm_id)
        self._doors.clone_slots.release(self._vm_id)

    def _watch(self, row: VmRow | None) -> None:
        identity = row.process if row is not None else None
        if self._process is not None and self._process.identity != identity:
            assert self._process_task is not None
            self._process_task.cancel()
            self._process = self._process_task = None
            self._doors.live.pop(self._vm_id, None)
        if identity is not None and row is not None and self._process is None:
            tag = row.tag

            async def report(seen: Seen) -> None:
                await self._deliver(Report(seen, tag))

            spec = machine_spec(self._doors.settings, row, row.accelerator or "tcg")
            self._process = LiveProcess(
                self._doors.host,
                self._doors.hypervisor,
                spec,
                identity,
                self._log,
                row.boot_key,
                report,
                manifest=None if row.boots == row.found_boot else guest_manifest(row),
                workload=workload_spec(row),
                neighbours=Neighbours(self._doors.store.projection, row, self._doors.settings.nameservers),
                telling=self._doors.telling,
                mending=self._doors.mending,
                handed_over=row.agent_seen,
                is_clone=row.template is not None,
                signal=row.manifest.template.signal,
                stands_still=row.phase is Phase.PAUSE or (row.status is Status.PAUSED and row.phase is Phase.NONE),
            )
            self._doors.live[self._vm_id] = self._process
            beside = partial(keep_user_network, self._doors, row, self._process) if is_user(row) else None
            self._process_task = self.ctx.spawn(self._process.run, beside, name="process")

    async def _deliver(self, report: Report) -> None:
        """Tell the own actor, again and again while the journal can't keep it."""
        pause_s = 0.1
        while True:
            try:
                return await self.ctx.self_ref.ask(report, timeout_s=2 * _COMMIT_TIMEOUT_S)
            except ActorDown:
                # This incarnation ends; the next one sees for itself.
                return
            except (Problem, AskTimeout) as error:
                _logger.warning(
                    "VM %s: %s; trying again in %.1f s", self._row.name, error, pause_s, extra={"vm": self._row.name}
                )
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _REPORT_PAUSE_MAX_S)

    async def _expire(self) -> None:
        assert self._row.expires_at is not None
        # The wall clock may be set, so no sleep is longer than a minute.
        while True:
            left_s = (self._row.expires_at - self._doors.host.clock.now()).total_seconds()
            if left_s <= 0:
                break
            await trio.sleep(min(left_s, 60.0))
        pause_s = 0.1
        while True:
            try:
                await self.ctx.self_ref.ask(Ask(CommandRequest(Command.DELETE)), timeout_s=2 * _COMMIT_TIMEOUT_S)
                return
            except (Problem, AskTimeout):
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, _REPORT_PAUSE_MAX_S)

    # The steps

    async def _perform(self, effect: Effect, before: tuple[TaskHandle | None, ...]) -> None:
        """Run one step, after what was under way has ended, and report what comes of it. What must be gone and is not,
        or must go on and does not, is tried again, and so is what the daemon, which drains anew, does not let begin:
        for as long as that is the step that the VM needs."""
        for task in before:
            if task is not None:
                await task.wait()
        pause_s = _AGAIN_S
        while True:
            try:
                seen = await self._outcome(effect, self._row)
            except (LaunchFailed, StepError) as error:
                seen = StepFailed(Reason(error.code, str(error), await self._console_tail()))
            await self._deliver(Report(seen, self._row.tag, effect))
            done = not isinstance(effect, Kill | Remove | Resume) or not isinstance(seen, StepFailed)
            if done and not isinstance(effect, Hold):
                return
            await trio.sleep(pause_s)
            pause_s = min(2 * pause_s, _AGAIN_MAX_S)

    async def _outcome(self, effect: Effect, row: VmRow) -> Seen:
        match effect:
            case PrepareImage():
                image, template, origin, standby = await prepare_boot(self._doors, row)
                await (self._doors.boot_slots if template is None else self._doors.clone_slots).acquire(row.id)
                socket = machine_spec(self._doors.settings, row, "tcg").console_socket_path
                tag = self._fresh_tag = tag_of(self._doors.instance, row)
                if standby is not None:
                    tag = standby.tag
                # A copy has what its origin had; what becomes a template has none, and so its clones have none.
                if row.checkpoint is not None:
                    balloon = row.balloon
                else:
                    balloon = template is None and self._doors.settings.return_memory
                return ImageReady(image, tag, str(socket), template, origin, balloon)
            case Launch(tag):
                return await self._launch(tag)
            case AwaitAgent():
                return await self._await_agent()
            case Pause():
                await self._pause()
                return Paused()
            case Resume():
                return await self._resume()
            case AskStop(grace_s=grace_s):
                return await self._ask_stop(grace_s)
            case Kill(tag):
                await self._kill(tag)
                return Cleared()
            case Remove():
                await self._remove(row)
                return Removed()
            case RestartLater(delay_s):
                await trio.sleep(delay_s)
                return RestartDue()
            case Hold():
                await self._doors.store.projection.undrained()
                return Released()

    async def _launch(self, tag: str) -> Seen:
        hypervisor, warm_pool, row = self._doors.hypervisor, self._doors.warm_pool, self._row
        fresh, self._fresh_tag = tag == self._fresh_tag, ""
        accelerator = await hypervisor.accelerator()
        spec = machine_spec(self._doors.settings, row, accelerator)
        with _deadline(self._doors.settings.launch_timeout_s, "launch_timeout", "the hypervisor was not up in time"):
            await attach(self._doors, row)
            found = None
            if self._standby is not None and self._standby.tag == tag:
                found = self._standby.identity
            elif not fresh:
                # A predecessor may have been killed between the launch and its commit. Where there was none, a look
                # through all processes would cost as much as starting one.
                found = await self._doors.host.processes.find(tag)
            try:
                claim = Claim(row.boots, row.name, row.layer, spec.nic)
                if found is not None and warm_pool.is_one(tag):
                    if not await warm_pool.claim(spec, claim):
                        found = None
                        await attach_anew(self._doors, row)
                    elif self._standby is not None and self._standby.tag == tag:
                        # Else an earlier daemon may have claimed it, and its passt may have ended since.
                        await note_connected(self._doors, row)
            except OSError as error:
                raise StepError("launch_failed", f"a process that was to become the VM is left: {error}") from error
            if found is not None and not warm_pool.is_one(tag) and not await self._finish_launch(spec, found):
                found = None
                await attach_anew(self._doors, row)
            if found is None:
                if spec.root is not None and row.template is not None and (warm_pool.is_one(tag) or not fresh):
                    # One that ran may have written to it.
                    await hypervisor.make_layer(spec.root, self._layer_of_origin(row.template))
                found = await self._launch_machine(spec)
                await note_connected(self._doors, row)
        return Launched(found, hypervisor.name, accelerator)

    async def _finish_launch(self, spec: MachineSpec, found: ProcessIdentity) -> bool:
        """Let a machine run that an earlier daemon has started, however far its launch has come; one that can't is
        ended: False. Nobody was told of it yet."""
        try:
            async with self._doors.hypervisor.attach(spec, found) as machine:
                await machine.resume()
            return True
        except HypervisorError as error:
            _logger.warning(
                "VM %s: the process %d, which an earlier daemon has started, can't go on, and is started anew: %s",
                spec.name, found.pid, error, extra={"vm": spec.name},
            )  # fmt: skip
        with suppress(ProcessGone), self._doors.host.processes.open(found) as process:
            process.kill()
            await process.wait()
        return False

    def _layer_of_origin(self, template: str) -> Path:
        """The layer that the guest of a template, or of a checkpoint, had when it was saved."""
        if is_checkpoint(template):
            return self._doors.checkpoints.at(template) / LAYER
        return template_layer(self._doors.settings.template_dir, template)

    async def _launch_machine(self, spec: MachineSpec) -> ProcessIdentity:
        """Where memory is short, a template's build gives way, and what waits for VMs to come."""
        try:
            return await self._doors.hypervisor.launch(spec)
        except LaunchFailed as error:
            with suppress(ActorDown, AskTimeout):
                if error.code == "memory_refused":
                    gone = await self._doors.warm_pool.give_way()
                    if await self._doors.builder.ask(GiveWay(), timeout_s=_GIVE_WAY_S) or gone:
                        return await self._doors.hypervisor.launch(spec)
            raise

    async def _await_agent(self) -> Seen:
        row, settings = self._row, self._doors.settings
        is_clone = row.template is not None
        timeout_s = min(_CLONE_S, settings.agent_timeout_s) if is_clone else settings.agent_timeout_s
        code = "clone_timeout" if is_clone else "agent_timeout"
        turn_ends_at = trio.current_time() + SLOT_S
        last = ""
        with trio.move_on_after(timeout_s):
            while True:
                if trio.current_time() >= turn_ends_at:
                    self._release_slots()
                try:
                    process = self._live()
                    if is_clone:
                        own_id = machine_id(self._doors.instance, row)
                        is_copy = row.checkpoint is not None
                        source = self._doors.checkpoints if is_copy else self._doors.templates
                        protocol = source.protocol(row.template or "")
                        await process.become(row.name, own_id, row.id, protocol=protocol, as_it_is=is_copy)
                    else:
                        await process.ask("GET", HEALTHZ)
                        if row.layer:
                            await process.root_mounted()
                        await process.hand_over()
                    return AgentAnswered()
                except AgentUnreachable as error:
                    last = f": {error}"
                    await trio.sleep(_AGENT_PAUSE_S)
                except RootFailed as error:
                    raise StepError("rootfs_failed", str(error)) from error
                except AgentProtocolError as error:
                    refused = "clone_refused" if is_clone else "agent_refused"
                    raise StepError(refused, f"the agent answered, but not as it should: {error}") from error
        raise StepError(code, f"the agent in the guest did not answer within {timeout_s:g} s{last}")

    def _live(self) -> LiveProcess:
        """:raises AgentUnreachable: the row has no process any more."""
        if self._process is None:
            raise AgentUnreachable("the hypervisor's process is gone")
        return self._process

    async def _pause(self) -> None:
        try:
            with _deadline(_PAUSE_S, "pause_failed", f"the guest did not stand still within {_PAUSE_S:g} s"):
                await self._live().pause()
        except (AgentUnreachable, HypervisorError) as error:
            raise StepError("pause_failed", f"the guest can't be paused: {error}") from error

    async def _resume(self) -> Seen:
        try:
            with _deadline(_RESUME_S, "resume_failed", f"the guest did not go on within {_RESUME_S:g} s"):
                process = self._live()
                await process.resume()
                try:
                    await process.set_clock()
                except (AgentUnreachable, AgentProtocolError) as error:
                    return Resumed(Reason("clock_not_set", f"the guest goes on, and its clock may be behind: {error}"))
                return Resumed()
        except (AgentUnreachable, HypervisorError) as error:
            raise StepError("resume_failed", f"the guest can't be resumed: {error}") from error

    async def _ask_stop(self, grace_s: float) -> Seen:
        """Ask the guest; the watch on the process tells when it is over, and this step is cancelled then."""
        with trio.move_on_after(grace_s):
            try:
                process = self._live()
                if process.stands_still:
                    with suppress(HypervisorError):
                        await process.resume()
                # The agent's patience ends before ours, so that a stubborn process does not cost the guest its sync.
                await process.ask("POST", DAEMON_SHUTDOWN, {"grace_s": grace_s * 0.8})
            except (AgentUnreachable, AgentProtocolError) as error:
                # It may have heard all the same.
                _logger.info(
                    "VM %s: asked to stop, no proper answer: %s", self._row.name, error, extra={"vm": self._row.name}
                )
            await trio.sleep_forever()
        return StepFailed(Reason("grace_over", f"the guest did not stop within {grace_s:g} s and is killed"))

    async def _kill(self, tag: str) -> None:
        """Leave no process and none of its files; nothing that the console said is lost."""
        host, settings, row = self._doors.host, self._doors.settings, self._row
        with _deadline(settings.kill_timeout_s, "unkillable", "the hypervisor's process does not end, although killed"):
            # The row's process is known beyond doubt; another one with its tag is of a daemon that died.
            known = row.process if row.process is not None and row.process.tag == tag else None
            await host.processes.end_all(tag, known)
        if self._process_task is not None:
            self._process_task.cancel()
            await self._process_task.wait()
        await detach(self._doors, row)
        spec = machine_spec(settings, row, row.accelerator or "tcg")
        with suppress(FileNotFoundError), ConsolePump(host, spec.console_path, self._log, row.boot_key) as console:
            await console.finish()
        try:
            await host.limits.remove_empty()
            await host.files.remove_tree(spec.directory)
            await host.files.remove_tree(spec.memory_file)
            if self._doors.warm_pool.is_one(tag):
                await host.files.remove_tree(standby_directory(settings.runtime_dir, tag))
        except OSError as error:
            raise StepError("not_removed", f"files of the VM can't be removed: {error}") from error

    async def _remove(self, row: VmRow) -> None:
        """Leave nothing that belongs to the VM beside its row."""
        if row.layer:
            try:
                await self._doors.host.files.remove_tree(layer_directory(self._doors.settings, row))
            except OSError as error:
                raise StepError("not_removed", f"the VM's disk can't be removed: {error}") from error
        try:
            await self._doors.logs.forget(row.id)
        except OSError as error:
            raise StepError("not_removed", f"the VM's log can't be ended: {error}") from error

    async def _console_tail(self) -> tuple[str, ...]:
        if self._process is not None:
            return await self._process.console_tail()
        return ()


@contextmanager
def _deadline(timeout_s: float, code: str, message: str) -> Iterator[None]:
    """:raises StepError: the block took longer."""
    with trio.move_on_after(timeout_s) as scope:
        yield
    if scope.cancelled_caught:
        raise StepError(code, message)


def _changed(row: VmRow) -> Problem:
    return Problem(
        412,
        "vm-changed",
        f"VM {row.name!r} has changed",
        vm=row.name,
        hint="read it again, and send its ETag as If-Match",
    )
