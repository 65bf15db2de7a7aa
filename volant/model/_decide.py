"""The decisions of the loop that drives a VM from its present to its desired state.

`decide(row, seen, now)` returns how the row changes after a command, the outcome of a step, or the end of the
hypervisor. `effect_of(row)` returns the step that the VM needs now. The actor commits the changes, cancels the running
step if it is another one, and starts the needed one.

The step follows from the row alone; `decide` returns no list of steps. So an actor that starts in the middle, after a
crash of the actor, the daemon or the host, continues like the one before it, without code of its own. Rejected: a table
of (state, message) -> (state, actions), as a crash of the actor would lose the current action.

Each change of the public status is in the table `TRANSITIONS` of `_event`.
"""

from __future__ import annotations

from datetime import datetime

import msgspec

from ._effects import MAX_RESTARTS, UP, has_failed, is_at_rest, is_held, restarts_by_itself
from ._event import check_transition
from ._moves import check_leaves, moving
from ._problem import Problem
from ._row import Desired, Leaving, Phase, ProcessIdentity, Reason, Status, VmRow
from ._seen import (
    AgentAnswered,
    Cleared,
    Command,
    CommandRequest,
    Ended,
    EndKind,
    ImageReady,
    Launched,
    Leaves,
    Left,
    Paused,
    Released,
    Removed,
    Replicated,
    RestartDue,
    Resumed,
    Seen,
    Stays,
    StepFailed,
    Woke,
    WorkloadChanged,
)

GUEST_SHUTDOWN = "guest_shutdown"
"""The reason code of a VM whose guest has powered itself off. Public."""
WORKLOAD_EXITED = "workload_exited"
"""The reason code of a VM that stopped because its workload exited with 0. Public."""
WORKLOAD_FAILED = "workload_failed"
"""The reason code of a VM that stopped because its workload failed. Public."""
_FINAL_GRACE_S = 10.0
"""How long the guest may take to shut down once the workload has ended."""


_BY_ITSELF = (GUEST_SHUTDOWN, WORKLOAD_EXITED, WORKLOAD_FAILED)
_WITH_WORKLOAD = (Status.STARTING, Status.RUNNING, Status.PAUSED)


class Step(msgspec.Struct, frozen=True):
    """A change of the row; None removes it. `message` is the text of its event, if it has one."""

    row: VmRow | None
    message: str


def decide(row: VmRow, seen: Seen, now: datetime, *, held: bool = False) -> tuple[Step, ...]:
    """Returns the changes that follow from an observation, in order.

    With `held`, no boot starts because the daemon drains. It starts with `Released`.

    :raises Problem: 409, a command is not legal now; 503, the VM moves to another host.
    """
    change = _Change(row, now, held)
    match seen:
        case CommandRequest():
            _carry_out(change, seen)
        case Leaves(leaving):
            _leave(change, leaving)
        case Stays(move, why):
            _stay(change, move, why)
        case Left(to_host):
            if row.status is not Status.DELETING:
                change.to("", desired=Desired.DELETED, grace_s=0)
                _end_process(change, Status.DELETING, f"{to_host} has it now")
        case Replicated(replica):
            if row.movable is not None and row.status is not Status.DELETING and replica != row.replica:
                change.to("", replica=replica)
        case Woke(process, rebooted):
            _woke(change, process, rebooted)
        case ImageReady(digest, tag, serial_socket, template, origin):
            if row.phase is Phase.IMAGE:
                change.to(
                    "launching",
                    phase=Phase.LAUNCH,
                    image=digest,
                    template=template,
                    balloon=seen.balloon,
                    origin=origin or row.origin,
                    tag=tag,
                    serial_socket=serial_socket,
                    boots=row.boots + 1,
                    booted=row.generation,
                    agent_seen=False,
                    disk_from=None,
                )
        case Launched(process, hypervisor, accelerator):
            if row.phase is Phase.LAUNCH:
                change.to(
                    "the hypervisor runs",
                    phase=Phase.AGENT,
                    process=process,
                    hypervisor=hypervisor,
                    accelerator=accelerator,
                    started_at=now,
                )
        case AgentAnswered():
            if row.phase is Phase.AGENT:
                change.to(
                    "the agent has answered",
                    status=Status.RUNNING,
                    phase=Phase.PAUSE if row.desired is Desired.PAUSED else Phase.NONE,
                    agent_seen=True,
                    checkpoint=None,
                )
                _stop_if_finished(change)
        case Paused():
            if row.phase is Phase.PAUSE:
                text = "paused" if row.leaving is None else f"paused, to go on at {row.leaving.to_host}"
                change.to(text, status=Status.PAUSED, phase=Phase.NONE, reason=None)
        case Resumed(reason):
            if row.phase is Phase.RESUME:
                # The reason says that a pause failed and was undone.
                before = row.reason if row.status is Status.RUNNING else None
                change.to("resumed", status=Status.RUNNING, phase=Phase.NONE, reason=reason or before)
                _stop_if_finished(change)
        case StepFailed(reason):
            _step_failed(change, reason)
        case Ended(kind, reason):
            _ended(change, kind, reason)
        case Cleared():
            _cleared(change)
        case Removed():
            if row.phase is Phase.REMOVE:
                change.remove("deleted" if row.leaving is None else f"moved to {row.leaving.to_host}")
        case RestartDue():
            if restarts_by_itself(row):
                change.to("", generation=row.generation + 1, restarts=row.restarts + 1)
                _boot(change, f"started again by its restart policy, {row.restarts + 1} of {MAX_RESTARTS}")
        case WorkloadChanged(workload):
            # A change while the guest shuts down says nothing about the workload.
            if row.process is not None and row.status in _WITH_WORKLOAD and workload != row.workload:
                change.to("the workload is " + (workload.state if workload is not None else "gone"), workload=workload)
                _stop_if_finished(change)
        case Released():
            if is_held(row):
                _boot(change, "started, as the daemon is not draining any more")
    _remove_at_rest(change)
    return tuple(change.steps)


class _Change:
    """Collects steps and checks their transitions. A step without a message is joined to the next one."""

    def __init__(self, row: VmRow, now: datetime, held: bool) -> None:
        self.row = row
        self.now = now
        self.held = held
        self.steps: list[Step] = []
        self._silent = False

    def to(self, message: str, **fields: object) -> None:
        after = msgspec.structs.replace(self.row, updated_at=self.now, **fields)
        check_transition(self.row.status, after.status)
        if self._silent:
            self.steps.pop()
        self.steps.append(Step(after, message))
        self.row, self._silent = after, not message

    def undo_message(self) -> None:
        """Joins the last step to the next, as if it had no message."""
        self._silent = bool(self.steps)

    def remove(self, message: str) -> None:
        check_transition(self.row.status, None)
        self.steps.append(Step(None, message))


def _boot(change: _Change, message: str) -> None:
    """Starts the desired boot, unless it must wait. Nothing of the last boot may be left."""
    if change.held:
        return
    change.to(
        message,
        status=Status.STARTING,
        phase=Phase.IMAGE,
        reason=None,
        process=None,
        tag="",
        agent_seen=False,
        workload=None,
        template=None,
        fallback=None,
    )


def _leave(change: _Change, leaving: Leaving) -> None:
    """Pauses the VM for its move to another host unless it is at rest, or records the next state of the move."""
    row = change.row
    if row.leaving is None:
        check_leaves(row)
        # It may have been started or stopped while a host was sought.
        leaving = msgspec.structs.replace(leaving, desired=row.desired)
        desired = row.desired if is_at_rest(row) else Desired.PAUSED
        phase = Phase.PAUSE if row.status is Status.RUNNING else Phase.NONE
        change.to(f"moves to {leaving.to_host}", leaving=leaving, desired=desired, phase=phase)
    elif row.leaving.id != leaving.id or row.status is Status.DELETING:
        raise moving(row, row.leaving)
    elif row.leaving != leaving:
        change.to("", leaving=leaving)


def _stay(change: _Change, move: str, why: str) -> None:
    """Lets the VM continue on this host."""
    row = change.row
    if row.leaving is None or row.leaving.id != move or row.status is Status.DELETING:
        return
    phase = row.phase
    is_paused = row.desired is Desired.PAUSED and row.status in (Status.RUNNING, Status.PAUSED)
    if is_paused and row.leaving.desired is Desired.RUNNING and phase in (Phase.NONE, Phase.PAUSE):
        # While it is being paused, it may be paused already.
        phase = Phase.RESUME
    change.to(f"stays here: {why}", leaving=None, desired=row.leaving.desired, phase=phase)


def _carry_out(change: _Change, request: CommandRequest) -> None:
    row = change.row
    if row.leaving is not None and request.command is not Command.RECOVER:
        raise moving(row, row.leaving)
    if row.status is Status.DELETING and request.command is not Command.DELETE:
        raise Problem(
            409,
            "vm-deleting",
            f"VM {row.name!r} is being deleted",
            vm=row.name,
            hint="wait until it is gone; its name can be used again then",
        )
    match request.command:
        case Command.START:
            _start(change, again=False)
        case Command.RESTART:
            change.to("", grace_s=request.grace_s)
            _start(change, again=True, aside=request.aside)
        case Command.PAUSE:
            _pause(change)
        case Command.RESUME:
            _check_up(row, "resumed")
            _go_on(change, "resume was requested")
        case Command.STOP:
            if row.status is not Status.STOPPED or row.desired is not Desired.STOPPED:
                change.to("", grace_s=request.grace_s)
                _stop(change)
        case Command.DELETE:
            if row.status is not Status.DELETING:
                change.to("", desired=Desired.DELETED, grace_s=request.grace_s)
                _end_process(change, Status.DELETING, "being deleted")
        case Command.RECOVER:
            if row.reason is None or row.reason.code != "control_lost":
                raise Problem(
                    409,
                    "vm-not-lost",
                    f"VM {row.name!r} is under control, there is nothing to recover",
                    vm=row.name,
                    hint="`start` boots a VM that has stopped or crashed",
                )
            change.to("control is back", reason=None)


def _check_up(row: VmRow, what: str) -> None:
    """:raises Problem: 409, there is no guest, and none is being booted."""
    if row.status not in (Status.PENDING, Status.STARTING, Status.RUNNING, Status.PAUSED):
        hint = f"`volar vms start {row.name}` starts it" if row.status is not Status.STOPPING else "wait until it runs"
        raise Problem(
            409,
            "vm-not-running",
            f"VM {row.name!r} is {row.status.value}, and can't be {what}",
            vm=row.name,
            hint=hint,
        )


def _pause(change: _Change) -> None:
    row = change.row
    _check_up(row, "paused")
    if row.desired is Desired.PAUSED:
        return
    if row.status in (Status.RUNNING, Status.PAUSED):
        change.to("pause was requested", desired=Desired.PAUSED, phase=Phase.PAUSE)
    else:
        change.to("will be paused once it runs", desired=Desired.PAUSED)


def _go_on(change: _Change, message: str) -> None:
    """Resumes a VM that should be paused; a VM that still boots runs afterwards."""
    row = change.row
    if row.desired is not Desired.PAUSED:
        return
    if row.status in (Status.RUNNING, Status.PAUSED):
        change.to(message, desired=Desired.RUNNING, phase=Phase.RESUME)
    else:
        change.to(message, desired=Desired.RUNNING)


def _start(change: _Change, *, again: bool, aside: bool = False) -> None:
    row = change.row
    match row.status:
        case Status.STOPPED | Status.CRASHED:
            change.to("", desired=Desired.RUNNING, generation=row.booted + 1, restarts=0)
            if row.phase is Phase.NONE:
                _boot(change, "start was requested")
            else:
                change.to("will be started once nothing of the last boot is left")
        case Status.STOPPING:
            change.to(
                "will be started after the stop",
                desired=Desired.RUNNING,
                generation=row.booted + 1,
                restarts=0,
            )
        case Status.STARTING | Status.RUNNING | Status.PAUSED if again:
            desired = row.desired if aside else Desired.RUNNING
            change.to("", desired=desired, generation=row.generation + 1, restarts=0)
            _end_process(change, Status.STOPPING, "restart was requested")
        case Status.PENDING | Status.STARTING | Status.RUNNING | Status.PAUSED:
            _go_on(change, "start was requested")


def _stop(change: _Change) -> None:
    row = change.row
    change.to("", desired=Desired.STOPPED, generation=row.booted)
    match row.status:
        case Status.PENDING:
            change.to("stopped before it was started", status=Status.STOPPED)
        case Status.CRASHED if row.phase is Phase.NONE:
            change.to("stopped", status=Status.STOPPED, reason=None)
        case Status.STARTING | Status.RUNNING | Status.PAUSED:
            _end_process(change, Status.STOPPING, "stop was requested")


def _stop_if_finished(change: _Change) -> None:
    """Stops a VM whose workload has ended, unless it is paused or changes its state already.

    An exit with 0 is like a shutdown by the guest. After a failure the restart policy applies as after a crash.
    """
    row = change.row
    if row.status is not Status.RUNNING or row.phase is not Phase.NONE or not row.is_finished:
        return
    assert row.workload is not None
    if has_failed(row):
        reason = Reason(WORKLOAD_FAILED, f"the workload has failed: {row.workload.error or 'it has not said why'}")
        goes_on = row.restart_policy != "never"
    else:
        reason = Reason(WORKLOAD_EXITED, "the workload has ended with exit code 0")
        goes_on = row.restart_policy == "always"
    status, desired = Status.STOPPING, row.desired if goes_on else Desired.STOPPED
    if row.is_removed_at_rest and not goes_on:
        status, desired = Status.DELETING, Desired.DELETED
    # Nothing that a guest still has to write outlives a VM that is deleted now, but what it has mounted.
    unmounts = bool(row.volumes or row.directories)
    grace_s = 0.0 if status is Status.DELETING and not unmounts else _FINAL_GRACE_S
    change.to("", desired=desired, grace_s=grace_s, reason=reason)
    _end_process(change, status, reason.message)


def _remove_at_rest(change: _Change) -> None:
    """Deletes a VM that has stopped for good and is not kept. It never shows `stopped`, which clients that wait for
    `stopped` would take for the end."""
    row = change.row
    if row.is_removed_at_rest and row.status is Status.STOPPED and row.leaving is None and is_at_rest(row):
        change.undo_message()
        change.to("deleted, as it has stopped", status=Status.DELETING, phase=Phase.REMOVE, desired=Desired.DELETED)


def _end_process(change: _Change, status: Status, message: str) -> None:
    """Goes to `status` (stopping or deleting). Asks the guest to shut down if possible."""
    row = change.row
    phase: Phase
    if row.phase in (Phase.KILL, Phase.ASK):
        phase = row.phase
    elif row.status in (Status.RUNNING, Status.PAUSED) and row.agent_seen and row.grace_s > 0:
        phase = Phase.ASK
    elif row.tag:
        phase = Phase.KILL
    else:
        phase = Phase.REMOVE if status is Status.DELETING else Phase.NONE
    change.to(message, status=status, phase=phase)
    if phase is Phase.NONE:
        _stopped(change)


def _woke(change: _Change, process: ProcessIdentity | None, rebooted: bool) -> None:
    row = change.row
    if row.status is Status.PENDING:
        _boot(change, "preparing the image")
    elif rebooted and row.status in (Status.STARTING, Status.RUNNING, Status.PAUSED) and row.phase is not Phase.IMAGE:
        # No crash: it starts again whatever its restart policy is.
        _boots_again(change, "the host was rebooted")
    elif row.phase in (Phase.NONE, Phase.AGENT, Phase.PAUSE, Phase.RESUME, Phase.ASK) and row.tag:
        if process is None:
            _ended(
                change,
                EndKind.GONE,
                Reason("hypervisor_gone", "the hypervisor's process is gone; it ended while nothing watched it"),
            )
        elif process != row.process:
            change.to("the hypervisor was found again", process=process)


def _step_failed(change: _Change, reason: Reason) -> None:
    row = change.row
    if row.phase in (Phase.KILL, Phase.REMOVE):
        change.to(reason.message, reason=reason)
    elif row.status is Status.STARTING:
        _boot_failed(change, reason)
    elif row.phase is Phase.ASK:
        change.to(reason.message, phase=Phase.KILL)
    elif row.phase is Phase.PAUSE:
        # The guest may be paused or not, so it is resumed.
        change.to(reason.message, desired=Desired.RUNNING, phase=Phase.RESUME, reason=reason)
    elif row.phase is Phase.RESUME:
        change.to(reason.message, reason=reason)


def _ended(change: _Change, kind: EndKind, reason: Reason) -> None:
    row = change.row
    if row.phase is Phase.KILL:
        return
    if row.status is Status.STARTING:
        _boot_failed(change, reason)
    elif row.phase is Phase.ASK:
        change.to("the guest has ended", phase=Phase.KILL)
    elif row.status in (Status.RUNNING, Status.PAUSED):
        if kind is EndKind.SHUTDOWN:
            desired = row.desired if row.restart_policy == "always" else Desired.STOPPED
            change.to(
                "the guest shut itself down", status=Status.STOPPING, phase=Phase.KILL, desired=desired, reason=reason
            )
        elif kind is EndKind.RESET:
            _boots_again(change, "the guest reboots")
        else:
            _crashed(change, reason)


def _boots_again(change: _Change, message: str) -> None:
    change.to(message, status=Status.STOPPING, phase=Phase.KILL, generation=change.row.generation + 1)


def _boot_failed(change: _Change, reason: Reason) -> None:
    """Boots cold after a failed clone of a template, but not of a checkpoint."""
    if change.row.template is not None and change.row.boot == "auto" and change.row.checkpoint is None:
        change.to(f"the clone failed, a cold boot follows: {reason.message}", phase=Phase.KILL, fallback=reason)
    else:
        _crashed(change, reason)


def _crashed(change: _Change, reason: Reason) -> None:
    phase = Phase.KILL if change.row.tag else Phase.NONE
    change.to(
        reason.message,
        status=Status.CRASHED,
        phase=phase,
        reason=reason,
        # A boot that failed before its launch counts as tried. Otherwise it would be tried for ever.
        booted=change.row.generation,
    )


def _cleared(change: _Change) -> None:
    row = change.row
    if row.phase is not Phase.KILL:
        return
    workload = row.workload if row.status is Status.STOPPING and row.is_finished else None
    change.to("", process=None, tag="", agent_seen=False, workload=workload, phase=Phase.NONE)
    match row.status:
        case Status.STARTING:
            change.to("booting cold, as the clone failed", phase=Phase.IMAGE, template=None)
        case Status.DELETING:
            change.to("nothing of its process is left", phase=Phase.REMOVE)
        case Status.STOPPING:
            _stopped(change)
        case Status.CRASHED if row.desired is Desired.STOPPED:
            change.to("stopped", status=Status.STOPPED, reason=None)
        case Status.CRASHED if row.desired in UP and row.generation > row.booted:
            _boot(change, "start was requested")
        case _:
            change.to("nothing of its process is left")


def _stopped(change: _Change) -> None:
    row = change.row
    # Only a stop that nobody requested has a reason until the next boot.
    by_itself = row.reason is not None and row.reason.code in _BY_ITSELF
    change.to("stopped", status=Status.STOPPED, reason=row.reason if by_itself else None)
    if change.row.desired in UP and change.row.generation > change.row.booted:
        _boot(change, "started again")
