"""What can be asked of the journal.

Every one of them is durable once it is answered, and can be answered with a `Problem` 503: `journal-full`,
`journal-unwritable`, `journal-slow` (it may still be made), `journal-busy`. The journal then goes on.

A message with a `key` stores its result in the same transaction (`RESULTS`). A repeated one changes nothing and raises
`DuplicateRequest`; one whose key was used for another request raises a `Problem` 422.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors import Request
from volant.model import (
    CreateNetwork,
    CreateVm,
    Drain,
    ForkVm,
    Manifest,
    Network,
    RestoreVm,
    Snapshot,
    Step,
    TakeSnapshot,
    VmRow,
)

from ._database import Loaded
from ._projection import Plugin
from ._responses import IdempotencyKey
from ._restore import Evidence
from ._results import (
    NetworkCreated,
    PluginChanged,
    PluginInstalled,
    Refusal,
    Result,
    SnapshotTaken,
    VmChanged,
    VmCreated,
    VmForked,
)


@dataclass(frozen=True, slots=True)
class CreateRow(Request[VmRow]):
    """Make a VM of status `pending` -> its row, with its id and its lease.

    :raises Problem: 400 for the request; 404 no such plugin or network; 409 name or port taken, plugin disabled;
        503 the daemon drains, no address is left, or such a network can't be had here.
    """

    request: CreateVm
    key: IdempotencyKey | None = None
    caller: str | None = None


@dataclass(frozen=True, slots=True)
class RestoreRow(Request[VmRow]):
    """Make a VM of status `pending` that is to go on from a snapshot -> its row.

    :raises Problem: 400 for the request; 404 no such snapshot, or its network is gone; 409 name taken, or it is not
        ready; 503 as with `CreateRow`.
    """

    request: RestoreVm
    key: IdempotencyKey | None = None
    caller: str | None = None


@dataclass(frozen=True, slots=True)
class ForkRow(Request[tuple[VmRow, ...]]):
    """Make the VMs that are to go on from `checkpoint`, which is of another one, and tell of it -> their rows, all
    or none.

    :raises Problem: 404 it is gone; 409 it is neither running nor paused, a name is taken; 503 as with `CreateRow`.
    """

    vm_id: int
    request: ForkVm
    checkpoint: str
    key: IdempotencyKey | None = None
    caller: str | None = None


@dataclass(frozen=True, slots=True)
class BeginSnapshot(Request[Snapshot]):
    """Make the row of a snapshot, `creating`. Its files may be made then.

    :raises Problem: 400 for the request; 404 the VM is gone; 409 it is neither running nor paused, the name is taken.
    """

    vm_id: int
    request: TakeSnapshot
    snapshot_id: str


@dataclass(frozen=True, slots=True)
class FinishSnapshot(Request[Snapshot]):
    """All of it is on the disk: it is `ready` -> its row. :raises Problem: 404 it is gone."""

    name: str
    snapshot_id: str
    paused_ms: float
    size_bytes: int
    key: IdempotencyKey | None = None


@dataclass(frozen=True, slots=True)
class RemoveSnapshot(Request[None]):
    """Take the row of a snapshot away; one that is gone is no error. :raises Problem: 409 a VM has yet to go on from
    it."""

    name: str
    snapshot_id: str


@dataclass(frozen=True, slots=True)
class CommitSteps(Request[VmRow | None]):
    """Change a row by all `steps` or none, each with its event -> the row as it then is, None once it is removed.

    The row's revision rises by one. No steps: nothing of it changes.

    :raises StaleRow: the row is not at `revision`, or is gone.
    :raises IllegalTransition: a step that is no legal transition.
    """

    vm_id: int
    revision: int
    steps: tuple[Step, ...]
    key: IdempotencyKey | None = None
    caller: str | None = None


@dataclass(frozen=True, slots=True)
class AdoptRow(Request[VmRow]):
    """Make the row of a VM that is found on the host -> the row. `steps` lead from `pending` to where it is, each with
    its event; the id is its own, and was given out before.

    :raises Problem: 409 the name is taken, or there is a VM with this id.
    """

    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class InstallPlugin(Request[Plugin]):
    """Add a plugin, enabled. :raises Problem: 400 for the manifest; 409 there is one of that name."""

    manifest: Manifest
    key: IdempotencyKey | None = None


@dataclass(frozen=True, slots=True)
class RemovePlugin(Request[None]):
    """Take a plugin away. :raises Problem: 404; 409 a VM uses it, or it is built in."""

    name: str


@dataclass(frozen=True, slots=True)
class EnablePlugin(Request[Plugin]):
    """Let new VMs use a plugin or not; those that are there go on. :raises Problem: 404; 409 it is built in."""

    name: str
    enabled: bool
    key: IdempotencyKey | None = None


@dataclass(frozen=True, slots=True)
class AddNetwork(Request[Network]):
    """Make a named network -> its row. :raises Problem: 400 for the name; 409 there is one of that name, or there are
    too many; 503 it can't be had here."""

    request: CreateNetwork
    key: IdempotencyKey | None = None


@dataclass(frozen=True, slots=True)
class RemoveNetwork(Request[None]):
    """Take a named network away. :raises Problem: 404; 409 a VM is in it."""

    name: str


@dataclass(frozen=True, slots=True)
class SetDrain(Request[Drain]):
    """Let no VM be made or start, until `EndDrain`, over restarts too. `stop_grace_s`: see `Drain`."""

    stop_grace_s: float | None = None


@dataclass(frozen=True, slots=True)
class EndDrain(Request[None]):
    """Let VMs be made and start again."""


@dataclass(frozen=True, slots=True)
class StoreRefusal(Request[None]):
    """Store that the request with this key was refused, and nothing was done."""

    refusal: Refusal
    key: IdempotencyKey


@dataclass(frozen=True, slots=True)
class Restore(Request[str]):
    """Let the next daemon go on with the database at `upload`, which `examine` has found to be `backup` -> its epoch.

    Once this is answered nothing is changed any more here, and `Store.replaced` tells the daemon.

    :raises Problem: 409 see `merge`; 503.
    """

    upload: Path
    backup: Loaded
    evidence: Evidence
    replace: bool


@dataclass(frozen=True, slots=True)
class StillThere(Request[None]):
    """Answered at once by a journal that takes messages, whatever its disk does. The one that is not durable."""


RESULTS: Mapping[type[Request[Any]], Callable[[Any], Result]] = {
    CreateRow: VmCreated.of,
    RestoreRow: VmCreated.of,
    ForkRow: VmForked.of,
    FinishSnapshot: SnapshotTaken.of,
    CommitSteps: VmChanged.of,
    InstallPlugin: PluginInstalled.of,
    EnablePlugin: PluginChanged.of,
    AddNetwork: NetworkCreated.of,
}
"""Makes the result that is stored for a message with a key from the reply to it."""
