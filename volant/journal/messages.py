"""Messages to the journal. All but `StillThere` and `Draft` are changes.

A change is durable once the journal replies. Any of them can fail with a `Problem` 503: `journal-full`,
`journal-unwritable`, `journal-slow` (the change may still be made), `journal-busy`. The journal then continues.

A message with a `key` stores its result in the same transaction (`RESULTS`). A repeated one changes nothing and raises
`DuplicateRequest`; one whose key was used for another request raises a `Problem` 422.

A message with a `cause` adds a record to the audit log in the same transaction. `ask_journal` sets it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from actors import Request
from volant.model import (
    BEGUN,
    DONE,
    ApiKey,
    Cause,
    CloneVolume,
    CreateApiKey,
    CreateNetwork,
    CreateProject,
    CreateVm,
    CreateVolume,
    Drain,
    EgressRequest,
    EventType,
    ForkVm,
    ImageFacts,
    Key,
    KeyUse,
    Manifest,
    Movable,
    Network,
    Problem,
    Project,
    Quota,
    RestoreVm,
    RotateApiKey,
    Secret,
    Snapshot,
    Step,
    TakeSnapshot,
    VmRow,
    Volume,
)

from . import _results
from ._definitions import Changes
from ._errors import DuplicateRequest
from ._named import Plugin
from ._responses import IdempotencyKey


class CreateRow(Request[VmRow], msgspec.Struct, frozen=True):
    """Creates a VM of status `pending` -> its row, with its id and its lease.

    With `starts`, the first boot begins in the same transaction: what its actor would do next. The projection then has
    the row `starting`, a revision later than that of the reply.

    :raises Problem: 400 for the request; 404 no such plugin, network or volume; 409 name or port taken, plugin
        disabled, another VM has a volume; 503 the daemon drains, no address is free, or this host can't have such a
        network.
    """

    request: CreateVm
    project: str
    key: IdempotencyKey | None = None
    cause: Cause | None = None
    manifest: Manifest | None = None
    """The manifest made from the request's OCI image, None for the plugin's."""
    starts: bool = False
    movable: Movable | None = None
    """None if no other host may start it."""


class RestoreRow(Request[VmRow], msgspec.Struct, frozen=True):
    """Creates a VM of status `pending` that continues from a snapshot -> its row.

    `volumes`: the VM's own copies of the snapshot's volumes, `creating` with whole files, by the ids of those. They
    become `ready`.

    :raises Problem: 400 for the request; 404 no such snapshot, or its network is gone; 409 name taken, or the
        snapshot is not ready; 503 as with `CreateRow`.
    """

    request: RestoreVm
    project: str
    key: IdempotencyKey | None = None
    cause: Cause | None = None
    volumes: Mapping[str, Volume] = {}


class ArriveRow(Request[VmRow], msgspec.Struct, frozen=True):
    """Creates the VM, of status `pending`, that continues here from the snapshot of its move -> its row, or the
    existing row if this was done before.

    :raises Problem: 404, the snapshot is gone, or its network or a secret; 409, the name or a port is taken, or the
        snapshot is not ready; 503 as with `CreateRow`.
    """

    named: Key
    """The snapshot's id."""
    epoch: int
    """The number of hosts that the VM has had."""
    cause: Cause | None = None


class ForkRow(Request[tuple[VmRow, ...]], msgspec.Struct, frozen=True):
    """Creates the VMs that continue from `checkpoint`, which is of another VM -> their rows, all or none.

    :raises Problem: 404 that VM is gone; 409 it is neither running nor paused, a name is taken; 503 as with
        `CreateRow`.
    """

    vm_id: int
    request: ForkVm
    checkpoint: str
    key: IdempotencyKey | None = None
    cause: Cause | None = None
    paused_ms: float | None = None
    """The pause of the VM for the checkpoint, None if that is not known."""


class BeginSnapshot(Request[Snapshot], msgspec.Struct, frozen=True):
    """Creates the row of a snapshot with the status `creating`. Its files may be written then.

    :raises Problem: 400 for the request; 404 the VM is gone; 409 it is neither running nor paused, the name is taken.
    """

    vm_id: int
    request: TakeSnapshot
    snapshot_id: str
    cause: Cause | None = None
    move: str = ""
    """The id of the move that it is for. It counts for no quota then."""


class AddSnapshot(Request[Snapshot], msgspec.Struct, frozen=True):
    """Creates the row of a snapshot that comes from another host, with the status `creating`. Its files may be put in
    place then.

    :raises Problem: 404 the project is gone; 409 the name is taken, or the quota is used up.
    """

    snapshot: Snapshot
    cause: Cause | None = None


class FinishSnapshot(Request[Snapshot], msgspec.Struct, frozen=True):
    """Makes a snapshot `ready`, whose files are on the disk -> its row. :raises Problem: 404 it is gone."""

    named: Key
    snapshot_id: str
    paused_ms: float
    size_bytes: int
    key: IdempotencyKey | None = None
    cause: Cause | None = None


class NotePush(Request[None], msgspec.Struct, frozen=True):
    """Adds the event of a snapshot that is in a registry, unless the snapshot is gone."""

    named: Key
    snapshot_id: str
    reference: str
    cause: Cause | None = None


class RemoveSnapshot(Request[None], msgspec.Struct, frozen=True):
    """Removes the row of a snapshot, if there is one. :raises Problem: 409 a VM is about to continue from it."""

    named: Key
    snapshot_id: str
    cause: Cause | None = None


class CommitSteps(Request[VmRow | None], msgspec.Struct, frozen=True):
    """Changes a row by all `steps` or none, each with its event -> the new row, None when it is removed.

    The row's revision rises by one, unless there are no steps.

    :raises StaleRow: the row is not at `revision`, or is gone.
    :raises Problem: 409 `VOLUME_REFUSALS`, where the VM would get a process.
    :raises IllegalTransition: a step that is no legal transition.
    """

    vm_id: int
    revision: int
    steps: tuple[Step, ...]
    key: IdempotencyKey | None = None
    cause: Cause | None = None


class AdoptRow(Request[VmRow], msgspec.Struct, frozen=True):
    """Creates the row of a VM that was found on the host -> the row. `steps` lead from `pending` to its status, each
    with its event. Its id was given out before.

    :raises Problem: 409 the name is taken, or there is a VM with this id.
    """

    steps: tuple[Step, ...]
    cause: Cause | None = None


class InstallPlugin(Request[Plugin], msgspec.Struct, frozen=True):
    """Adds a plugin, enabled. :raises Problem: 400 for the manifest; 409 there is one of that name."""

    manifest: Manifest
    project: str
    key: IdempotencyKey | None = None
    cause: Cause | None = None


class RemovePlugin(Request[None], msgspec.Struct, frozen=True):
    """Removes a plugin. :raises Problem: 404; 409 a VM uses it, or it is built in."""

    named: Key
    cause: Cause | None = None


class EnablePlugin(Request[Plugin], msgspec.Struct, frozen=True):
    """Allows or forbids new VMs to use a plugin. :raises Problem: 404; 409 it is built in."""

    named: Key
    enabled: bool
    key: IdempotencyKey | None = None
    cause: Cause | None = None


class AddNetwork(Request[Network], msgspec.Struct, frozen=True):
    """Creates a named network -> its row. :raises Problem: 400 for the name; 409 the name is taken, or there are too
    many; 503 this host can't have it."""

    request: CreateNetwork
    project: str
    key: IdempotencyKey | None = None
    cause: Cause | None = None


class RemoveNetwork(Request[None], msgspec.Struct, frozen=True):
    """Removes a named network. :raises Problem: 404; 409 a VM is in it."""

    named: Key
    cause: Cause | None = None


class BeginVolume(Request[Volume], msgspec.Struct, frozen=True):
    """Creates the row of a volume with the status `creating`. Its file may be made then.

    `source`: the name of the volume in this project that it is to be a copy of; the request is a `CloneVolume` then.

    :raises Problem: 400 for the request; 404 no such source; 409 the name is taken, there are too many, a VM writes to
        the source, or the source is being made or deleted.
    """

    request: CreateVolume | CloneVolume
    project: str
    volume_id: str
    source: str | None = None
    cause: Cause | None = None


class FinishVolume(Request[Volume], msgspec.Struct, frozen=True):
    """Makes a volume `ready`, whose file is on the disk -> its row. :raises Problem: 404 it is gone."""

    named: Key
    volume_id: str
    key: IdempotencyKey | None = None
    cause: Cause | None = None


class ResizeRow(Request[Volume], msgspec.Struct, frozen=True):
    """Gives a volume another size, before its file has it -> its row.

    :raises Problem: 404 it is gone; 409 it would shrink, or is being made, deleted or copied.
    """

    named: Key
    volume_id: str
    size_mb: int
    key: IdempotencyKey | None = None
    cause: Cause | None = None


class BeginRemovalOfVolume(Request[Volume], msgspec.Struct, frozen=True):
    """Makes a volume `deleting`, so that its file may be removed -> its row.

    :raises Problem: 404; 409 a VM refers to it, or it is being made or copied.
    """

    named: Key
    cause: Cause | None = None


class AbandonVolume(Request[Volume | None], msgspec.Struct, frozen=True):
    """Makes a volume `deleting` that was not finished -> its row, None if it is gone. One that is `ready` stays so."""

    named: Key
    volume_id: str


class ForgetVolume(Request[None], msgspec.Struct, frozen=True):
    """Removes the row of a volume that is `deleting` and has no file, if there is one."""

    named: Key
    volume_id: str


class SealSecret(Request[Secret], msgspec.Struct, frozen=True):
    """Sets the encrypted value of a secret -> its row. The value is bound to `version`, which has to be the next one.

    :raises Problem: 400 for the name; 404 no such project; 409 it has another version (`VERSION_CHANGED`), or there are
        too many.
    """

    named: Key
    version: int
    key_id: str
    sealed: bytes
    cause: Cause | None = None


class ReencryptSecret(Request[Secret], msgspec.Struct, frozen=True):
    """Replaces an encrypted value by the same one, encrypted with another key -> its row. One request does so for many
    secrets, and has its record as a whole.

    :raises Problem: 409 it has another version than `version` (`VERSION_CHANGED`), or is gone.
    """

    named: Key
    version: int
    key_id: str
    sealed: bytes


VERSION_CHANGED = "secret-changed"
"""The code of the refusal of an encrypted value that another one preceded."""


class RemoveSecret(Request[None], msgspec.Struct, frozen=True):
    """Removes a secret. :raises Problem: 404; 409 a VM refers to it."""

    named: Key
    cause: Cause | None = None


class AddKey(Request[ApiKey], msgspec.Struct, frozen=True):
    """Adds an API key -> its row. TCP is closed for clients without a key then, for good.

    `has_administrator`: whether there is an administrator's key that is no named one.

    :raises Problem: 400 for the request; 409 the name is taken, it is the first and no administrator's, or there are
        too many.
    """

    request: CreateApiKey
    digest: str
    key_id: str
    by: str
    has_administrator: bool
    cause: Cause | None = None


class RotateKey(Request[ApiKey], msgspec.Struct, frozen=True):
    """Replaces an API key by another one, with the same role and project -> its row. :raises Problem: 404."""

    name: str
    request: RotateApiKey
    digest: str
    by: str
    cause: Cause | None = None


class RemoveKey(Request[None], msgspec.Struct, frozen=True):
    """Removes an API key and those that it replaced. :raises Problem: 404; 409 it is the last administrator's."""

    name: str
    has_administrator: bool
    cause: Cause | None = None


class NoteKeyUses(Request[None], msgspec.Struct, frozen=True):
    """Notes when and from where API keys were used, by their digests. Those that are gone are left out."""

    uses: Mapping[str, KeyUse]


class CountBuild(Request[None], msgspec.Struct, frozen=True):
    """Counts the build of a template as the creation of a VM that would be its clone. The VM takes nothing of the quota
    afterwards, as the template belongs to no project. :raises Problem: as for that VM."""

    row: VmRow


class AddProject(Request[Project], msgspec.Struct, frozen=True):
    """Adds a project -> its row. :raises Problem: 400 for the name; 409 the name is taken, or there are too many."""

    request: CreateProject
    key: IdempotencyKey | None = None
    cause: Cause | None = None


class SetQuota(Request[Project], msgspec.Struct, frozen=True):
    """Replaces the limits of a project -> its row. :raises Problem: 404."""

    project: str
    quota: Quota
    cause: Cause | None = None


class SetProjectEgress(Request[Project], msgspec.Struct, frozen=True):
    """Replaces the egress policy of a project -> its row. :raises Problem: 400 a rule is malformed; 404."""

    project: str
    egress: EgressRequest
    cause: Cause | None = None


class RemoveProject(Request[None], msgspec.Struct, frozen=True):
    """Removes a project. :raises Problem: 404; 409 something is in it, or it is `default`."""

    project: str
    cause: Cause | None = None


class Drafted(msgspec.Struct, frozen=True):
    """The expected outcome of a change."""

    reply: Any
    changes: Changes
    """The changed definitions. The change has no other effects than these, its record and its stored response."""


class Draft(Request[Drafted], msgspec.Struct, frozen=True):
    """Decides a change on the committed state, without making it. :raises: the same errors as the change."""

    raises = (Problem, DuplicateRequest)
    change: Request[Any]


class TakeDefinitions(Request[Any], msgspec.Struct, frozen=True):
    """Makes definitions what the hosts of a fleet have agreed on, without another check -> `reply`.

    With `change`, which was drafted here, it has that one's record, and stores that one's response.
    """

    changes: Changes
    change: Request[Any] | None = None
    reply: Any = None

    @property
    def key(self) -> IdempotencyKey | None:
        """The idempotency key of the change."""
        return getattr(self.change, "key", None)

    @property
    def cause(self) -> Cause | None:
        """The cause of the change."""
        return getattr(self.change, "cause", None)


class SetDrain(Request[Drain], msgspec.Struct, frozen=True):
    """Stops VMs from being created or started until `EndDrain`, over restarts too. `stop_grace_s`: see `Drain`."""

    stop_grace_s: float | None = None
    cause: Cause | None = None


class EndDrain(Request[None], msgspec.Struct, frozen=True):
    """Allows VMs to be created and started again."""

    cause: Cause | None = None


class AddImageEvent(Request[None], msgspec.Struct, frozen=True):
    """Adds an event of an OCI image."""

    type: EventType
    project: str
    image: ImageFacts
    message: str


class StoreRefusal(Request[None], msgspec.Struct, frozen=True):
    """Stores that the request with this key was refused, and nothing was done."""

    refusal: _results.Refusal
    key: IdempotencyKey
    cause: Cause | None = None


class WriteRecord(Request[None], msgspec.Struct, frozen=True):
    """Adds a record to the audit log of what is about to be done, or was done without another change."""

    cause: Cause
    outcome: str


class StillThere(Request[None], msgspec.Struct, frozen=True):
    """Gets a reply at once if the journal receives messages, independent of its disk."""


RESULTS: Mapping[type[Request[Any]], Callable[[Any], _results.Result]] = {
    CreateRow: _results.VmCreated.of,
    RestoreRow: _results.VmCreated.of,
    ForkRow: _results.VmForked.of,
    FinishSnapshot: _results.SnapshotTaken.of,
    CommitSteps: _results.VmChanged.of,
    InstallPlugin: _results.PluginInstalled.of,
    EnablePlugin: _results.PluginChanged.of,
    AddNetwork: _results.NetworkCreated.of,
    AddProject: _results.ProjectCreated.of,
    FinishVolume: _results.VolumeCreated.of,
    ResizeRow: _results.VolumeChanged.of,
}
"""Makes the result that is stored for a message with a key from the reply to it."""

SHARED: frozenset[type[Request[Any]]] = frozenset(
    {
        InstallPlugin, RemovePlugin, EnablePlugin, AddNetwork, RemoveNetwork, SealSecret, ReencryptSecret, RemoveSecret,
        AddKey, RotateKey, RemoveKey, AddProject, SetQuota, SetProjectEgress, RemoveProject,
    }
)  # fmt: skip
"""Changes of definitions, which the hosts of a fleet have to agree on."""

_BEGINNINGS = (BeginSnapshot, AddSnapshot, BeginVolume, BeginRemovalOfVolume)


def result_of(message: Request[Any], reply: Any) -> _results.Result:
    """Returns the result that is stored for a message with a key."""
    change = message.change if isinstance(message, TakeDefinitions) and message.change is not None else message
    return RESULTS[type(change)](reply)


def outcome_of(message: Request[Any]) -> str:
    """Returns the outcome in the record of a message with a cause."""
    if isinstance(message, WriteRecord):
        return message.outcome
    if isinstance(message, StoreRefusal):
        return f"{message.refusal.status} {message.refusal.code}"
    return BEGUN if isinstance(message, _BEGINNINGS) else DONE
