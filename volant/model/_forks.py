"""The fork tree: which VM or snapshot is a copy of which, including deleted ones.

It follows from the present VMs and snapshots and from the events of deleted ones (docs/explanation/snapshots.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from ._event import Event, EventType
from ._problem import invalid
from ._project import DEFAULT_PROJECT
from ._row import Origin, VmRow
from ._snapshot import FIRST_FOREIGN_ID, Snapshot
from ._text import Time

FORK_EVENTS = (
    EventType.VM_CREATED,
    EventType.VM_DELETED,
    EventType.SNAPSHOT_TAKEN,
    EventType.SNAPSHOT_PULLED,
    EventType.SNAPSHOT_DELETED,
)
"""The events that `fork_tree` needs."""

ForkKind = Literal["fork", "snapshot", "restore"]
"""`fork`: a VM copied from a VM; `snapshot`: a snapshot of a VM; `restore`: a VM from a snapshot."""

_Place = tuple[int, str]
"""The id of a VM and ""; or the id of a snapshot's VM and the id of the snapshot. The ids of VMs only rise, so a copy
always comes after its source, and the order never changes."""


class ForkNode(msgspec.Struct, frozen=True, kw_only=True):
    """A VM that is a copy or was copied, or a snapshot."""

    id: str
    """`vm-` or `snapshot-` and an id that is never used again."""
    kind: Literal["vm", "snapshot"]
    name: str
    status: str | None
    """The VM's status, or `ready` for a snapshot; null if it is deleted."""
    created_at: Time | None
    """Null if it was deleted so long ago that its events have expired."""
    deleted_at: Time | None = None
    """Null if it is not deleted, or if its events have expired."""
    project: str = DEFAULT_PROJECT


class ForkEdge(msgspec.Struct, frozen=True, kw_only=True):
    """A copy of a VM or snapshot. At most one edge leads to a node."""

    source: str
    """The id of the node that was copied."""
    target: str
    """The id of the node that is the copy."""
    kind: ForkKind
    at: Time | None
    """When the copy was made."""
    paused_ms: float | None
    """How long the source was paused for the copy; null with `restore`, as a snapshot does not run."""


class ForkTree(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the fork tree. Sources come before their copies, perhaps on an earlier page."""

    nodes: list[ForkNode]
    edges: list[ForkEdge]
    """The edges that lead to these nodes."""
    event_id: str
    """The last event that the tree includes."""
    next_cursor: str | None
    """Null on the last page."""


class _Known(msgspec.Struct, frozen=True, gc=False):
    """The known facts about a node. Of very many such entries, only one page becomes nodes and edges."""

    name: str
    project: str
    status: str | None = None
    created_at: Time | None = None
    deleted_at: Time | None = None
    kind: ForkKind | None = None
    """How the node was made; None if it is no copy."""
    source: _Place | None = None
    paused_ms: float | None = None


def fork_tree(
    rows: Iterable[VmRow], snapshots: Iterable[Snapshot], past: Iterable[Event], event_id: str
) -> WholeForkTree:
    """Returns the tree of all present and past VMs and snapshots.

    :param rows: the present VMs
    :param snapshots: the present snapshots
    :param past: all stored events of the types `FORK_EVENTS`, in order
    :param event_id: the last event that these include
    """
    tree = WholeForkTree(event_id)
    for event in past:
        time, created_at, deleted_at = event.timestamp, event.created_at, None
        if event.type is EventType.VM_CREATED:
            created_at = time
        elif event.type is not EventType.SNAPSHOT_TAKEN:
            deleted_at = time
        if event.snapshot_id is None:
            tree.add_vm(event.vm_id, event.name, event.project, event.origin, None, created_at, deleted_at)
        else:
            place, name = (event.vm_id, event.snapshot_id), event.snapshot or ""
            tree.add_snapshot(place, name, event.name, event.project, event.paused_ms, None, created_at, deleted_at)
    # Existing objects override events: some events may have expired, and after a restore they may be older or newer.
    for row in rows:
        tree.add_vm(row.id, row.name, row.project, row.origin, row.status.value, row.created_at)
    for one in snapshots:
        if one.status == "ready":
            place = (one.vm.id, one.id)
            tree.add_snapshot(place, one.name, one.vm.name, one.project, one.paused_ms, one.status, one.created_at)
    return tree


class WholeForkTree:
    """All known nodes by place. `fork_tree` makes it."""

    def __init__(self, event_id: str) -> None:
        self._event_id = event_id
        self._known: dict[_Place, _Known] = {}
        self._copied: dict[_Place, _Known] = {}
        """Sources, as far as their copies know them."""

    def page(self, cursor: str, limit: int) -> ForkTree:
        """Returns up to `limit` nodes after a cursor; "" begins at the first node. :raises Problem: 400, the cursor is
        malformed."""
        after = _order(_place_of(cursor)) if cursor else (False, (0, ""))
        # A VM that is no copy and was not copied is in no tree.
        copies = {place for place, known in self._known.items() if known.source is not None}
        left = [place for place in sorted(copies | self._copied.keys(), key=_order) if _order(place) > after]
        shown = [(place, self._known.get(place) or self._copied[place]) for place in left[:limit]]
        return ForkTree(
            nodes=[_node(place, known) for place, known in shown],
            edges=[edge for place, known in shown if (edge := _edge(place, known)) is not None],
            event_id=self._event_id,
            next_cursor="-".join(map(str, shown[-1][0])) if len(shown) < len(left) else None,
        )

    def add_vm(
        self,
        vm_id: int,
        name: str,
        project: str,
        origin: Origin | None,
        status: str | None,
        created_at: Time | None,
        deleted_at: Time | None = None,
    ) -> None:
        """Adds a VM, or replaces the earlier facts about it."""
        if origin is None:
            self._known[vm_id, ""] = _Known(name, project, status, created_at, deleted_at)
            return
        kind: ForkKind = "fork" if origin.kind == "fork" else "restore"
        # An earlier version kept only the name of a snapshot. Its VM stands for it.
        source = (origin.vm_id, origin.snapshot_id or "")
        paused_ms = origin.paused_ms if kind == "fork" else None
        self._known[vm_id, ""] = _Known(name, project, status, created_at, deleted_at, kind, source, paused_ms)
        source_name = (origin.snapshot or "") if origin.snapshot_id else origin.vm
        self._copied[source] = _Known(source_name, project)

    def add_snapshot(
        self,
        place: _Place,
        name: str,
        vm: str,
        project: str,
        paused_ms: float | None,
        status: str | None,
        created_at: Time | None,
        deleted_at: Time | None = None,
    ) -> None:
        """Adds a snapshot of the VM named `vm`, or replaces the earlier facts about it."""
        source = (place[0], "")
        self._known[place] = _Known(name, project, status, created_at, deleted_at, "snapshot", source, paused_ms)
        self._copied[source] = _Known(vm, project)


def _order(place: _Place) -> tuple[bool, _Place]:
    """Returns the sort key. Snapshots from other hosts come first, as VMs restored from them have smaller ids."""
    return place[0] < FIRST_FOREIGN_ID, place


def _node(place: _Place, known: _Known) -> ForkNode:
    return ForkNode(
        id=_node_id(place),
        kind="snapshot" if place[1] else "vm",
        name=known.name,
        status=known.status,
        created_at=known.created_at,
        deleted_at=known.deleted_at,
        project=known.project,
    )


def _edge(place: _Place, known: _Known) -> ForkEdge | None:
    if known.source is None or known.kind is None:
        return None
    return ForkEdge(
        source=_node_id(known.source),
        target=_node_id(place),
        kind=known.kind,
        at=known.created_at,
        paused_ms=known.paused_ms,
    )


def _node_id(place: _Place) -> str:
    vm_id, snapshot_id = place
    return f"snapshot-{snapshot_id}" if snapshot_id else f"vm-{vm_id}"


def _place_of(cursor: str) -> _Place:
    vm_id, dash, snapshot_id = cursor.partition("-")
    if not dash or not vm_id.isascii() or not vm_id.isdecimal() or len(vm_id) > 18:
        raise invalid("cursor", f"cursor {cursor[:80]!r} is not one of an earlier page", hint="use its `next_cursor`")
    return int(vm_id), snapshot_id
