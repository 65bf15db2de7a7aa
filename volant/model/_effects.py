"""The step that a VM needs now. It follows from the row alone."""

from __future__ import annotations

from typing import Literal

import msgspec

from ._row import Desired, Phase, Status, VmRow, visible_workload

MAX_RESTARTS = 10
"""Maximum restarts in a row without a `start` by a client. Then the restart policy gives up."""
UP = (Desired.RUNNING, Desired.PAUSED)
"""The desired states of a VM with a guest. A VM that should be paused boots first."""


class PrepareImage(msgspec.Struct, frozen=True):
    """Finds, builds or fetches the files to boot from, and creates the layer -> `ImageReady`."""

    boot: str
    cold: bool = False
    """Whether to boot without a template, as the clone has failed."""


class _OfProcess(msgspec.Struct, frozen=True):
    """A step about the process with this tag."""

    tag: str


class Launch(_OfProcess, frozen=True):
    """Starts the hypervisor with this tag, or finds it -> `Launched`."""


class AwaitAgent(_OfProcess, frozen=True):
    """Waits for the agent and sends it the workload -> `AgentAnswered`."""


class Pause(_OfProcess, frozen=True):
    """Pauses the guest -> `Paused`."""


class Resume(_OfProcess, frozen=True):
    """Resumes the guest and sets its clock -> `Resumed`."""


class AskStop(_OfProcess, frozen=True):
    """Asks the guest to shut down, after resuming it if necessary -> `Ended`, or `StepFailed` after `grace_s`."""

    grace_s: float


class Kill(_OfProcess, frozen=True):
    """Ends the process with this tag and removes its files -> `Cleared`."""


class Remove(msgspec.Struct, frozen=True):
    """Removes the disk and everything else that outlives a boot -> `Removed`."""


class RestartLater(msgspec.Struct, frozen=True):
    """Waits `delay_s` -> `RestartDue`."""

    delay_s: float


class Hold(msgspec.Struct, frozen=True):
    """Waits until the daemon is not draining -> `Released`."""

    boot: str


Effect = PrepareImage | Launch | AwaitAgent | Pause | Resume | AskStop | Kill | Remove | RestartLater | Hold


def effect_of(row: VmRow) -> Effect | None:
    """Returns the step that the VM needs now; None if it is at rest."""
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
        case Phase.NONE if is_held(row):
            return Hold(f"{row.id}.{row.generation}")
        case Phase.NONE:
            return RestartLater(_backoff_s(row.restarts)) if restarts_by_itself(row) else None


def settled(row: VmRow) -> bool:
    """Returns whether the status stays until a client or the guest does something."""
    match row.status:
        case Status.RUNNING | Status.PAUSED:
            return row.phase is Phase.NONE
        case Status.STOPPED | Status.CRASHED if row.desired in UP:
            return row.generation <= row.booted and not _policy_restarts(row)
        case Status.STOPPED:
            return True
        case Status.CRASHED:
            return row.phase is Phase.NONE
        case _:
            return False


def readiness(row: VmRow) -> Literal["met", "failed"] | None:
    """Returns whether a VM is `ready` or can't become ready. None if it is not ready yet, or if its status already says
    so."""
    workload = visible_workload(row)
    match row.status:
        case Status.RUNNING:
            if workload is None or workload.state in ("healthy", "exited"):
                return "met"
            return "failed" if workload.state == "failed" else None
        case Status.STOPPING | Status.STOPPED | Status.DELETING if workload is not None:
            if row.desired in UP and row.generation > row.booted:
                return None
            if workload.state == "exited":
                return "met"
            tried_again = row.desired in UP and (row.status is Status.STOPPING or _policy_restarts(row))
            return None if tried_again else "failed"
        case _:
            return None


def is_held(row: VmRow) -> bool:
    """Returns whether a boot waits because the daemon drains."""
    return (
        row.status in (Status.PENDING, Status.STOPPED, Status.CRASHED)
        and row.phase is Phase.NONE
        and row.desired in UP
        and row.generation > row.booted
    )


def is_at_rest(row: VmRow) -> bool:
    """Returns whether the VM has stopped or crashed, and stays so until a client starts or deletes it."""
    is_down = row.status in (Status.STOPPED, Status.CRASHED) and row.phase is Phase.NONE
    return is_down and not is_held(row) and not restarts_by_itself(row)


def restarts_by_itself(row: VmRow) -> bool:
    """Returns whether the restart policy starts the VM again."""
    return row.phase is Phase.NONE and row.desired in UP and _policy_restarts(row)


def _policy_restarts(row: VmRow) -> bool:
    # A copy that has never run can't be started again.
    return (
        row.checkpoint is None
        and row.restarts < MAX_RESTARTS
        and (
            (row.status is Status.CRASHED and row.restart_policy != "never")
            or (row.status is Status.STOPPED and row.restart_policy == "always")
            or (row.status is Status.STOPPED and row.restart_policy == "on-failure" and has_failed(row))
        )
    )


def has_failed(row: VmRow) -> bool:
    """Returns whether the VM stopped, or is stopping, because its workload has failed."""
    return row.is_finished and row.workload is not None and row.workload.state == "failed"


def _backoff_s(restarts: int) -> float:
    return min(60.0, 2.0**restarts)
