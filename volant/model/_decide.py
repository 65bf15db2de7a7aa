"""A VM is a loop that drives what is to what should be; this is the loop's mind.

`decide(row, seen, now)` says how the row changes because something was seen: a command, the outcome of a step, the end
of the hypervisor. `effect_of(row)` says which one step the VM needs now, from the row alone. The actor commits the
changes, then makes the running step the needed one: it cancels what is no longer needed and starts what is.

The step is a function of the row, and not a list that `decide` returns, so that an incarnation which begins in the
middle (after a crash of its actor, of the daemon, of the host) does what its predecessor would have done next, with no
code of its own. Rejected: a table of (state, message) -> (state, actions), where what is under way lives in the
actor's memory and is lost with it.

Every change of the public status stands in `_transitions.py`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Literal

import msgspec

from ._problem import Problem
from ._row import Desired, Origin, Phase, ProcessIdentity, Reason, Status, VmRow, WorkloadView
from ._transitions import check_transition

MAX_RESTARTS = 10
"""A policy gives up after so many restarts in a row without a person's `start`."""
_UP = (Desired.RUNNING, Desired.PAUSED)
"""What is wanted of a VM that is to have a guest: one that should be paused boots first."""
GUEST_SHUTDOWN = "guest_shutdown"
"""The reason's code of a VM whose guest has powered itself off. Public."""


# What is seen ------------------------------------------------------------------------------------------------------


class Command(StrEnum):
    """What a client can have a VM do."""

    START = "start"
    STOP = "stop"
    RESTART = "restart"
    PAUSE = "pause"
    RESUME = "resume"
    DELETE = "delete"
    RECOVER = "recover"


class CommandRequest(msgspec.Struct, frozen=True):
    """A client, or the VM's `ttl`, wants a command carried out."""

    # Named so in the digests that stored responses have of requests.
    command: Command = msgspec.field(name="kind")
    grace_s: float = 10.0
    aside: bool = False
    """With `RESTART`: one that should be paused still should, once it has booted again."""
    caller: str | None = None
    """Who asks, for the event of what follows at once."""


class Woke(msgspec.Struct, frozen=True):
    """An incarnation of the actor begins. `process` is what was found on the host under the row's tag."""

    process: ProcessIdentity | None
    rebooted: bool = False
    """Whether the host was rebooted since the VM's process was started."""


class ImageReady(msgspec.Struct, frozen=True):
    """Kernel and initramfs lie in the cache. `tag` is what the process to come will carry."""

    digest: str
    tag: str
    serial_socket: str | None = None
    """Where the daemon will serve the serial console of that process."""
    template: str | None = None
    """What the boot goes on from; None: nothing, it is a cold one."""
    origin: Origin | None = None
    """What is known now of whose copy it is."""
    balloon: bool = False
    """Whether the machine has one; see `VmRow`."""


class Launched(msgspec.Struct, frozen=True):
    """A hypervisor process runs, started or found."""

    process: ProcessIdentity
    hypervisor: str
    accelerator: Literal["kvm", "tcg"]


class AgentAnswered(msgspec.Struct, frozen=True):
    """The agent in the guest has answered and has got its workload."""


class Paused(msgspec.Struct, frozen=True):
    """The guest stands still."""


class Resumed(msgspec.Struct, frozen=True):
    """The guest goes on, and has been told the time; `reason` says why it has not."""

    reason: Reason | None = None


class StepFailed(msgspec.Struct, frozen=True):
    """The step under way came to nothing, or its deadline passed."""

    reason: Reason


class EndKind(StrEnum):
    """How a guest or its hypervisor ended."""

    SHUTDOWN = "shutdown"
    RESET = "reset"
    PANICKED = "panicked"
    KILLED = "killed"
    EXITED = "exited"
    INTERNAL_ERROR = "internal-error"
    GONE = "gone"
    """It was not there any more when an actor began to watch."""


class Ended(msgspec.Struct, frozen=True):
    """The guest is over. The process may still be there, kept so that the reason could be read."""

    kind: EndKind
    reason: Reason


class Cleared(msgspec.Struct, frozen=True):
    """No process and none of its files are left on the host."""


class Removed(msgspec.Struct, frozen=True):
    """Nothing of a VM that is being deleted is left."""


class RestartDue(msgspec.Struct, frozen=True):
    """The back-off before an automatic restart has passed."""


class WorkloadChanged(msgspec.Struct, frozen=True):
    """The agent says how the workload is now; None: it has none."""

    workload: WorkloadView | None


class Released(msgspec.Struct, frozen=True):
    """The daemon does not drain, or does not any more."""


Seen = (
    CommandRequest
    | Woke
    | ImageReady
    | Launched
    | AgentAnswered
    | Paused
    | Resumed
    | StepFailed
    | Ended
    | Cleared
    | Removed
    | RestartDue
    | Released
    | WorkloadChanged
)


# What is to be done ------------------------------------------------------------------------------------------------


class PrepareImage(msgspec.Struct, frozen=True):
    """Find what the VM boots from, build or fetch what the cache lacks, make its layer -> `ImageReady`."""

    boot: str
    cold: bool = False
    """Whether a clone has failed, and the boot begins anew without one."""


class Launch(msgspec.Struct, frozen=True):
    """Start the hypervisor under `tag`, or find it -> `Launched`."""

    tag: str


class AwaitAgent(msgspec.Struct, frozen=True):
    """Wait for the agent's first answer and hand it the workload -> `AgentAnswered`."""

    tag: str


class Pause(msgspec.Struct, frozen=True):
    """Make the guest stand still -> `Paused`."""

    tag: str


class Resume(msgspec.Struct, frozen=True):
    """Let the guest go on, and set its clock -> `Resumed`."""

    tag: str


class AskStop(msgspec.Struct, frozen=True):
    """Ask the guest, which goes on for that if it is paused, to shut down -> `Ended`, or `StepFailed` once `grace_s`
    has passed."""

    tag: str
    grace_s: float


class Kill(msgspec.Struct, frozen=True):
    """End the process under `tag` and remove its files -> `Cleared`."""

    tag: str


class Remove(msgspec.Struct, frozen=True):
    """Remove what belongs to the VM and not to a boot -> `Removed`."""


class RestartLater(msgspec.Struct, frozen=True):
    """Wait `delay_s` -> `RestartDue`."""

    delay_s: float


class Hold(msgspec.Struct, frozen=True):
    """Wait until the daemon lets VMs start -> `Released`."""

    boot: str


Effect = PrepareImage | Launch | AwaitAgent | Pause | Resume | AskStop | Kill | Remove | RestartLater | Hold


def effect_of(row: VmRow) -> Effect | None:
    """The one step that `row` needs now; None when the VM is at rest."""
    match row.phase:
        case Phase.IMAGE:
            return PrepareImage(f"{row.id}.{row.generation}", cold=row.fallback is not None)
        case Phase.LAUNCH:
            return Launch(row.tag)
        case Phase.AGENT:
            return AwaitAgent(row.tag)
        case Phase.PAUSE:
            return Pause(row.tag)
        case Phase.RESUME:
            return Resume(row.tag)
        case Phase.ASK:
            return AskStop(row.tag, row.grace_s)
        case Phase.KILL:
            return Kill(row.tag)
        case Phase.REMOVE:
            return Remove()
        case Phase.NONE if _is_held(row):
            return Hold(f"{row.id}.{row.generation}")
        case Phase.NONE:
            return RestartLater(_backoff_s(row.restarts)) if _restarts_by_itself(row) else None


def settled(row: VmRow) -> bool:
    """Whether the public status stays what it is until somebody, or the guest, does something."""
    match row.status:
        case Status.RUNNING | Status.PAUSED:
            return row.phase is Phase.NONE
        case Status.STOPPED | Status.CRASHED if row.desired in _UP:
            return row.generation <= row.booted and not _policy_restarts(row)
        case Status.STOPPED:
            return True
        case Status.CRASHED:
            return row.phase is Phase.NONE
        case _:
            return False


# How the row changes -----------------------------------------------------------------------------------------------


class Step(msgspec.Struct, frozen=True):
    """One change of the row; `row` None removes it. `message` is the text of its event, if it has one."""

    row: VmRow | None
    message: str


def decide(row: VmRow, seen: Seen, now: datetime, *, held: bool = False) -> tuple[Step, ...]:
    """The changes, in order, that follow from what was seen; empty when there are none.

    `held`: no boot may begin, as the daemon drains. One that is due then begins with `Released`.

    :raises Problem: 409 when a command is not legal now.
    """
    change = _Change(row, now, held)
    match seen:
        case CommandRequest():
            _carry_out(change, seen)
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
        case Paused():
            if row.phase is Phase.PAUSE:
                change.to("paused", status=Status.PAUSED, phase=Phase.NONE, reason=None)
        case Resumed(reason):
            if row.phase is Phase.RESUME:
                # That a pause failed, and was taken back, is worth knowing.
                before = row.reason if row.status is Status.RUNNING else None
                change.to("goes on", status=Status.RUNNING, phase=Phase.NONE, reason=reason or before)
        case StepFailed(reason):
            _step_failed(change, reason)
        case Ended(kind, reason):
            _ended(change, kind, reason)
        case Cleared():
            _cleared(change)
        case Removed():
            if row.phase is Phase.REMOVE:
                change.remove("deleted")
        case RestartDue():
            if _restarts_by_itself(row):
                change.to("", generation=row.generation + 1, restarts=row.restarts + 1)
                _boot(change, f"started again by its restart policy, {row.restarts + 1} of {MAX_RESTARTS}")
        case WorkloadChanged(workload):
            if row.process is not None and workload != row.workload:
                change.to("the workload is " + (workload.state if workload is not None else "gone"), workload=workload)
        case Released():
            if _is_held(row):
                _boot(change, "started, as the daemon does not drain any more")
    return tuple(change.steps)


class _Change:
    """Collects steps; checks each against the table of edges; joins a step that has no message to the next."""

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

    def remove(self, message: str) -> None:
        check_transition(self.row.status, None)
        self.steps.append(Step(None, message))


def _boot(change: _Change, message: str) -> None:
    """Begin the wanted boot, unless it must wait. Only when nothing of the last one is left."""
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


def _carry_out(change: _Change, request: CommandRequest) -> None:
    row = change.row
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
            _go_on(change, "resume was asked for")
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
    """:raises Problem: 409 when there is no guest, and none is being booted."""
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
        change.to("pause was asked for", desired=Desired.PAUSED, phase=Phase.PAUSE)
    else:
        change.to("will be paused once it runs", desired=Desired.PAUSED)


def _go_on(change: _Change, message: str) -> None:
    """Want it to run, if it was to be paused."""
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
                _boot(change, "start was asked for")
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
            _end_process(change, Status.STOPPING, "restart was asked for")
        case Status.PENDING | Status.STARTING | Status.RUNNING | Status.PAUSED:
            _go_on(change, "start was asked for")


def _stop(change: _Change) -> None:
    row = change.row
    change.to("", desired=Desired.STOPPED, generation=row.booted)
    match row.status:
        case Status.PENDING:
            change.to("stopped before it was started", status=Status.STOPPED)
        case Status.CRASHED if row.phase is Phase.NONE:
            change.to("stopped", status=Status.STOPPED, reason=None)
        case Status.STARTING | Status.RUNNING | Status.PAUSED:
            _end_process(change, Status.STOPPING, "stop was asked for")


def _end_process(change: _Change, status: Status, message: str) -> None:
    """Go to `status` (stopping or deleting) by the politest way that the state allows."""
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
        # Nobody's fault, so no crash: what should run runs again, whatever its restart policy.
        _boots_again(change, "the host was rebooted")
    elif row.phase in (Phase.NONE, Phase.AGENT, Phase.PAUSE, Phase.RESUME, Phase.ASK) and row.tag:
        if process is None:
            _ended(
                change,
                EndKind.GONE,
                Reason("hypervisor_gone", "the hypervisor's process is gone; it ended while nobody watched it"),
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
        # Whether the guest stands still now nobody knows, so it is let go on.
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
        change.to("the guest is over", phase=Phase.KILL)
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
    """A clone that comes to nothing is a reason to boot cold, once nothing of it is left. What was to go on from a copy
    of another guest is not: a cold boot is not what was asked for."""
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
        # A boot that failed before its launch counts as tried, else it would be tried for ever.
        booted=change.row.generation,
    )


def _cleared(change: _Change) -> None:
    row = change.row
    if row.phase is not Phase.KILL:
        return
    change.to("", process=None, tag="", agent_seen=False, workload=None, phase=Phase.NONE)
    match row.status:
        case Status.STARTING:
            change.to("booting cold, as the clone failed", phase=Phase.IMAGE, template=None)
        case Status.DELETING:
            change.to("nothing of its process is left", phase=Phase.REMOVE)
        case Status.STOPPING:
            _stopped(change)
        case Status.CRASHED if row.desired is Desired.STOPPED:
            change.to("stopped", status=Status.STOPPED, reason=None)
        case Status.CRASHED if row.desired in _UP and row.generation > row.booted:
            _boot(change, "start was asked for")
        case _:
            change.to("nothing of its process is left")


def _stopped(change: _Change) -> None:
    row = change.row
    # What went wrong on the way is over; that nobody but the guest wanted it is worth knowing until the next boot.
    by_itself = row.reason is not None and row.reason.code == GUEST_SHUTDOWN
    change.to("stopped", status=Status.STOPPED, reason=row.reason if by_itself else None)
    if change.row.desired in _UP and change.row.generation > change.row.booted:
        _boot(change, "started again")


def _is_held(row: VmRow) -> bool:
    """Whether a boot is due and has not begun: only a daemon that drains leaves it at that."""
    return (
        row.status in (Status.PENDING, Status.STOPPED, Status.CRASHED)
        and row.phase is Phase.NONE
        and row.desired in _UP
        and row.generation > row.booted
    )


def _restarts_by_itself(row: VmRow) -> bool:
    """Whether a VM is due for another boot by its restart policy."""
    return row.phase is Phase.NONE and row.desired in _UP and _policy_restarts(row)


def _policy_restarts(row: VmRow) -> bool:
    # Of a copy that has never run there is nothing to start again.
    return (
        row.checkpoint is None
        and row.restarts < MAX_RESTARTS
        and (
            (row.status is Status.CRASHED and row.restart_policy != "never")
            or (row.status is Status.STOPPED and row.restart_policy == "always")
        )
    )


def _backoff_s(restarts: int) -> float:
    return min(60.0, 2.0**restarts)
