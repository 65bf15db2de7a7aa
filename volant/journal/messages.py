"""Messages to the journal. All but `StillThere` are changes.

A change is durable once the journal replies. Any of them can fail with a `Problem` 503: `journal-full`,
`journal-unwritable`, `journal-slow` (the change may still be made), `journal-busy`. The journal then goes on.

A message with a `key` stores its result in the same transaction (`RESULTS`). A repeated one changes nothing and raises
`DuplicateRequest`; one whose key was used for another request raises a `Problem` 422.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec

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

from . import _results
from ._database import Loaded
from ._merge import Evidence
from ._projection import Plugin
from ._responses import IdempotencyKey


class CreateRow(Request[VmRow], msgspec.Struct, frozen=True):
    """Creates a VM of status `pending` -> its row, with its id and its lease.

    :raises Problem: 400 for the request; 404 no such plugin or network; 409 name or port taken, plugin disabled;
        503 the daemon drains, no address is free, or this host can't have such a network.
    """

    request: CreateVm
    key: IdempotencyKey | None = None
    caller: str | None = None


class RestoreRow(Request[VmRow], msgspec.Struct, frozen=True):
    """Creates a VM of status `pending` that continues from a snapshot -> its row.

    :raises Problem: 400 for the request; 404 no such snapshot, or its network is gone; 409 name taken, or the
        snapshot is not ready; 503 as with `CreateRow`.
    """

    request: RestoreVm
    key: IdempotencyKey | None = None
    caller: str | None = None


class ForkRow(Request[tuple[VmRow, ...]], msgspec.Struct, frozen=True):
    """Creates the VMs that continue from `checkpoint`, which is of another VM -> their rows, all or none.

    :raises Problem: 404 that VM is gone; 409 it is neither running nor paused, a name is taken; 503 as with
        `CreateRow`.
    """

    vm_id: int
    request: ForkVm
    checkpoint: str
    key: IdempotencyKey | None = None
    caller: str | None = None


class BeginSnapshot(Request[Snapshot], msgspec.Struct, frozen=True):
    """Creates the row of a snapshot with the status `creating`. Its files may be written then.

    :raises Problem: 400 for the request; 404 the VM is gone; 409 it is neither running nor paused, the name is taken.
    """

    vm_id: int
    request: TakeSnapshot
    snapshot_id: str


class FinishSnapshot(Request[Snapshot], msgspec.Struct, frozen=True):
    """Makes a snapshot `ready`, whose files are on the disk -> its row. :raises Problem: 404 it is gone."""

    name: str
    snapshot_id: str
    paused_ms: float
    size_bytes: int
    key: IdempotencyKey | None = None


class RemoveSnapshot(Request[None], msgspec.Struct, frozen=True):
    """Removes the row of a snapshot, if there is one. :raises Problem: 409 a VM is about to continue from it."""

    name: str
    snapshot_id: str


class CommitSteps(Request[VmRow | None], msgspec.Struct, frozen=True):
    """Changes a row by all `steps` or none, each with its event -> the new row, None when it is removed.

    The row's revision rises by one, unless there are no steps.

    :raises StaleRow: the row is not at `revision`, or is gone.
    :raises IllegalTransition: a step that is no legal transition.
    """

    vm_id: int
    revision: int
    steps: tuple[Step, ...]
    key: IdempotencyKey | None = None
    caller: str | None = None


class AdoptRow(Request[VmRow], msgspec.Struct, frozen=True):
    """Creates the row of a VM that was found on the host -> the row. `steps` lead from `pending` to its status, each
    with its event. Its id was given out before.

    :raises Problem: 409 the name is taken, or there is a VM with this id.
    """

    steps: tuple[Step, ...]


class InstallPlugin(Request[Plugin], msgspec.Struct, frozen=True):
    """Adds a plugin, enabled. :raises Problem: 400 for the manifest; 409 there is one of that name."""

    manifest: Manifest
    key: IdempotencyKey | None = None


class RemovePlugin(Request[None], msgspec.Struct, frozen=True):
    """Removes a plugin. :raises Problem: 404; 409 a VM uses it, or it is built in."""

    name: str


class EnablePlugin(Request[Plugin], msgspec.Struct, frozen=True):
    """Allows or forbids new VMs to use a plugin. :raises Problem: 404; 409 it is built in."""

    name: str
    enabled: bool
    key: IdempotencyKey | None = None


class AddNetwork(Request[Network], msgspec.Struct, frozen=True):
    """Creates a named network -> its row. :raises Problem: 400 for the name; 409 the name is taken, or there are too
    many; 503 this host can't have it."""

    request: CreateNetwork
    key: IdempotencyKey | None = None


class RemoveNetwork(Request[None], msgspec.Struct, frozen=True):
    """Removes a named network. :raises Problem: 404; 409 a VM is in it."""

    name: str


class SetDrain(Request[Drain], msgspec.Struct, frozen=True):
    """Stops VMs from being created or started until `EndDrain`, over restarts too. `stop_grace_s`: see `Drain`."""

    stop_grace_s: float | None = None


class EndDrain(Request[None], msgspec.Struct, frozen=True):
    """Allows VMs to be created and started again."""


class StoreRefusal(Request[None], msgspec.Struct, frozen=True):
    """Stores that the request with this key was refused, and nothing was done."""

    refusal: _results.Refusal
    key: IdempotencyKey


class Restore(Request[str], msgspec.Struct, frozen=True):
    """Has the next daemon continue with the database at `upload`, which `examine` has read as `backup` -> its epoch.

    After the reply the journal refuses changes, and `Store.replaced` is set.

    :raises Problem: 409 see `merge`; 503.
    """

    upload: Path
    backup: Loaded
    evidence: Evidence
    replace: bool


class StillThere(Request[None], msgspec.Struct, frozen=True):
    """Gets a reply at once from a journal that takes messages, whatever its disk does."""


RESULTS: Mapping[type[Request[Any]], Callable[[Any], _results.Result]] = {
    CreateRow: _results.VmCreated.of,
    RestoreRow: _results.VmCreated.of,
    ForkRow: _results.VmForked.of,
    FinishSnapshot: _results.SnapshotTaken.of,
    CommitSteps: _results.VmChanged.of,
    InstallPlugin: _results.PluginInstalled.of,
    EnablePlugin: _results.PluginChanged.of,
    AddNetwork: _results.NetworkCreated.of,
}
"""Makes the result that is stored for a message with a key from the reply to it."""
