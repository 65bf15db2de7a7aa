"""What can be asked of a VM's actor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from actors import Request
from volant.hypervisor import Checkpoint, CheckpointFailed
from volant.journal import DuplicateRequest, IdempotencyKey
from volant.model import CommandRequest, Effect, Problem, Seen, VmRow


@dataclass(frozen=True, slots=True)
class Ask(Request[VmRow]):
    """A client wants something -> the row, durable.

    :raises Problem: 409 not legal now; 412 the row is at none of `revisions`; 422 the key was used for another request;
        503 the journal can't keep it.
    :raises DuplicateRequest: the same request came before; nothing was done now.
    """

    request: CommandRequest
    revisions: frozenset[int] | None = None
    """None: whatever the row is at."""
    key: IdempotencyKey | None = None
    raises = (Problem, DuplicateRequest)


@dataclass(frozen=True, slots=True)
class CheckpointTaken:
    """A guest that was copied."""

    checkpoint: Checkpoint
    protocol: int
    """The newest that its agent is known to speak."""


@dataclass(frozen=True, slots=True)
class TakeCheckpoint(Request[CheckpointTaken]):
    """Copy the guest into an empty directory; it stands still for a moment, or goes on doing so. A command that
    wants it to be something else ends that.

    :raises Problem: 409 there is no guest that runs or is paused, or it is to be something else.
    :raises CheckpointFailed: there is no copy. The directory is the caller's to remove.
    """

    into: Path
    raises = (Problem, CheckpointFailed)


@dataclass(frozen=True, slots=True)
class Report(Request[None]):
    """A task of the actor has seen something. `effect` is the step that it comes from; a late report of a step that is
    no longer the wanted one is dropped. None: it comes from the process itself, of which `tag` tells.

    :raises Problem: 503 the journal can't keep it now; report again.
    """

    seen: Seen
    tag: str
    effect: Effect | None = None
    raises = (Problem,)
