"""The input of `decide`: observations of a VM's actor, and requests of clients."""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

import msgspec

from ._audit import Cause
from ._row import Leaving, Origin, ProcessIdentity, Reason, Replica, WorkloadView


class Command(StrEnum):
    """A command that a client can send to a VM."""

    START = "start"
    STOP = "stop"
    RESTART = "restart"
    PAUSE = "pause"
    RESUME = "resume"
    DELETE = "delete"
    RECOVER = "recover"


class CommandRequest(msgspec.Struct, frozen=True):
    """A client, or the VM's `ttl`, requests a command."""

    command: Command
    grace_s: float = 10.0
    aside: bool = False
    """With `RESTART`: whether a VM that should be paused is paused after the boot."""
    cause: Cause | None = None
    """The requester, for the record and the first event that follows."""


class Leaves(msgspec.Struct, frozen=True):
    """The VM is to continue on another host, or is about to be given to it (`deciding`)."""

    leaving: Leaving


class Stays(msgspec.Struct, frozen=True):
    """The VM continues on this host after all."""

    id: str
    """The id of the move."""
    reason: str
    """The reason, for people."""


class Left(msgspec.Struct, frozen=True):
    """The VM belongs to another host, so it ends here."""

    to_host: str


class Replicated(msgspec.Struct, frozen=True):
    """Other hosts have newer copies of the VM, or the reason why not is known."""

    replica: Replica


class Woke(msgspec.Struct, frozen=True):
    """The actor starts. `process` is the host's process with the row's tag."""

    process: ProcessIdentity | None
    rebooted: bool = False
    """Whether the host has rebooted since the VM's process was started."""


class ImageReady(msgspec.Struct, frozen=True):
    """Kernel and initramfs are in the cache. `tag` is for the process that will be launched."""

    digest: str
    tag: str
    serial_socket: str | None = None
    """The path of the socket for that process's serial console."""
    template: str | None = None
    """The template or checkpoint that the boot continues from; None for a cold boot."""
    origin: Origin | None = None
    """The origin with the facts known now."""
    balloon: bool = False
    """See `VmRow`."""


class Launched(msgspec.Struct, frozen=True):
    """The hypervisor's process runs. It was started or found."""

    process: ProcessIdentity
    hypervisor: str
    accelerator: Literal["kvm", "tcg"]


class AgentAnswered(msgspec.Struct, frozen=True):
    """The agent in the guest has answered and has received its workload."""


class Paused(msgspec.Struct, frozen=True):
    """The guest is paused."""


class Resumed(msgspec.Struct, frozen=True):
    """The guest runs again. `reason` says why its clock could not be set."""

    reason: Reason | None = None


class StepFailed(msgspec.Struct, frozen=True):
    """The current step failed, or its deadline passed."""

    reason: Reason


class EndKind(StrEnum):
    """The way in which a guest or its hypervisor ended."""

    SHUTDOWN = "shutdown"
    RESET = "reset"
    PANICKED = "panicked"
    KILLED = "killed"
    EXITED = "exited"
    INTERNAL_ERROR = "internal-error"
    GONE = "gone"
    """The process was gone when the actor started."""


class Ended(msgspec.Struct, frozen=True):
    """The guest has ended. The process may still exist, so that the reason can be read."""

    kind: EndKind
    reason: Reason


class Cleared(msgspec.Struct, frozen=True):
    """Neither the process nor its files are left on the host."""


class Removed(msgspec.Struct, frozen=True):
    """Nothing is left of a VM that is being deleted."""


class RestartDue(msgspec.Struct, frozen=True):
    """The back-off before an automatic restart has passed."""


class WorkloadChanged(msgspec.Struct, frozen=True):
    """The agent reports a new state of the workload; None if there is no workload."""

    workload: WorkloadView | None


class Released(msgspec.Struct, frozen=True):
    """The daemon is not draining."""


Seen = (
    CommandRequest
    | Leaves
    | Stays
    | Left
    | Replicated
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
