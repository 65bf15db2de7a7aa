"""The messages that a VM's actor takes, and the failure of a step."""

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
"""Deadline of the hypervisor for a checkpoint."""


class Ask(Request[VmRow], msgspec.Struct, frozen=True):
    """A client's command, or what a move to another host wants -> the row, durable.

    :raises Problem: 409 not legal now; 412 the row is at none of `revisions`; 422 the key was used for another request;
        503 the journal can't keep it.
    :raises DuplicateRequest: the same request came before; nothing was done now.
    """

    request: CommandRequest | Leaves | Stays | Left | Replicated
    revisions: frozenset[int] | None = None
    """None: whatever the row is at."""
    key: IdempotencyKey | None = None
    raises = (Problem, DuplicateRequest)


class CheckpointTaken(msgspec.Struct, frozen=True):
    """A guest that was copied."""

    checkpoint: Checkpoint
    protocol: int
    """The newest that its agent is known to speak."""


class TakeCheckpoint(Request[CheckpointTaken], msgspec.Struct, frozen=True):
    """Copies the guest into an empty directory. It is paused for a moment, or stays paused. A command that wants it to
    be something else ends that.

    :raises Problem: 409 there is no guest that runs or is paused, or it is to be something else.
    :raises CheckpointFailed: there is no copy. The directory is the caller's to remove.
    """

    into: Path
    volumes: Path | None = None
    """The directory for copies of the volumes that the VM writes to, None if it writes to none."""
    raises = (Problem, CheckpointFailed)


class Report(Request[None], msgspec.Struct, frozen=True):
    """An observation of a task of the actor.

    `effect`: the step that reports. A late report, of a step that is no longer the wanted one, is dropped. None: the
    process with the process tag `tag` reports.

    :raises Problem: 503 the journal can't keep it now; report again.
    """

    seen: Seen
    tag: str
    effect: Effect | None = None
    raises = (Problem,)
