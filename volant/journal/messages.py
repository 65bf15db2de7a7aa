"""What can be asked of the journal.

Every one of them is durable once it is answered, and can be answered with a `Problem` 503: `journal-full`,
`journal-unwritable`, `journal-slow` (it may still be made), `journal-busy`. The journal then goes on.

Those with `once` keep their answer in the same transaction. One that was answered before raises `AlreadyAnswered` and
changes nothing; one whose `once` stands for something else is a `Problem` 422.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors import Request
from volant.model import CreateVm, Manifest, Step, VmRow

from ._answers import Once, Refusal
from ._projection import Plugin


@dataclass(frozen=True, slots=True)
class CreateRow(Request[VmRow]):
    """Make a VM of status `pending` -> its row, with its id.

    :raises Problem: 400 for the request; 404 no such plugin; 409 name taken, plugin disabled.
    """

    request: CreateVm
    once: Once | None = None


@dataclass(frozen=True, slots=True)
class CommitSteps(Request[VmRow | None]):
    """Change a row by all `steps` or none, each with its event -> the row as it then is, None once it is removed.

    The row's revision rises by one. No steps: nothing of it changes.

    :raises StaleRow: the row is not at `revision`, or is gone.
    :raises IllegalEdge: a step that the table of edges does not have.
    """

    vm_id: int
    revision: int
    steps: tuple[Step, ...]
    once: Once | None = None


@dataclass(frozen=True, slots=True)
class InstallPlugin(Request[Plugin]):
    """Add a plugin, enabled. :raises Problem: 400 for the manifest; 409 there is one of that name."""

    manifest: Manifest
    once: Once | None = None


@dataclass(frozen=True, slots=True)
class RemovePlugin(Request[None]):
    """Take a plugin away. :raises Problem: 404; 409 a VM uses it, or it is built in."""

    name: str


@dataclass(frozen=True, slots=True)
class EnablePlugin(Request[Plugin]):
    """Let new VMs use a plugin or not; those that are there go on. :raises Problem: 404; 409 it is built in."""

    name: str
    enabled: bool
    once: Once | None = None


@dataclass(frozen=True, slots=True)
class KeepRefusal(Request[None]):
    """Keep that a request was refused and nothing was done. Answered when it is durable."""

    refusal: Refusal
    once: Once


@dataclass(frozen=True, slots=True)
class StillThere(Request[None]):
    """Answered at once by a journal that takes messages, whatever its disk does. The one that is not durable."""
