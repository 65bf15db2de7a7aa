"""The messages that a VM's actor receives, and the failure of a step."""

from __future__ import annotations

from pathlib import Path

import msgspec

from actors import Request
from volant.hypervisor import Checkpoint, CheckpointFailed
from volant.journal import DuplicateRequest, IdempotencyKey
from volant.model import CommandRequest, Effect, Leaves, Left, Problem, Replicated, Seen, Stays, VmRow


class StepError(Exception):
    """A step of a VM failed. `code` becomes the reason's code, the text its message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


CHECKPOINT_S = 60.0
"""The hypervisor's deadline for a checkpoint."""


class Ask(Request[VmRow], msgspec.Struct, frozen=True):
    """Carries out a client's command, or a step of a move to another host -> the row, durable.

    :raises Problem: 409, not legal now; 412, the row is at none of `revisions`; 422, the key was used for another
        request; 503, the journal can't store the change.
    :raises DuplicateRequest: the same request was executed before, and this one was not.
    """

    request: CommandRequest | Leaves | Stays | Left | Replicated
    revisions: frozenset[int] | None = None
    """The accepted revisions of the row; None for any."""
    key: IdempotencyKey | None = None
    raises = (Problem, DuplicateRequest)


class CheckpointTaken(msgspec.Struct, frozen=True):
    """The copy of a guest."""

    checkpoint: Checkpoint
    protocol: int
    """The newest protocol that its agent is known to support."""


class TakeCheckpoint(Request[CheckpointTaken], msgspec.Struct, frozen=True):
    """Copies the guest into an empty directory -> the copy. The guest is paused briefly, or stays paused. A command for
    another state cancels the copy.

    :raises Problem: 409, no guest is running or paused, or it should be in another state.
    :raises CheckpointFailed: there is no copy. The caller must remove the directory.
    """

    into: Path
    volumes: Path | None = None
    """The directory for copies of the volumes that the VM writes to; None if it writes to none."""
    raises = (Problem, CheckpointFailed)


class Report(Request[None], msgspec.Struct, frozen=True):
    """An observation of a task of the actor.

    `effect` is the step that reports; None if it is the process with the process tag `tag`. A late report, of a step
    that is no longer wanted, is dropped.

    :raises Problem: 503, the journal can't store it now; report again.
    """

    seen: Seen
    tag: str
    effect: Effect | None = None
    raises = (Problem,)
