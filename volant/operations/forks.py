"""The fork tree: which VM or snapshot is a copy of which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from volant.model import FORK_EVENTS, Event, ForkTree, Permission, fork_tree

from ._context import Context
from ._parameters import Integer, Text
from ._spans import Part, Spans, event_id_of
from ._table import TABLE, Tool

if TYPE_CHECKING:
    from volant.fleet import Fleet, PeerAnswer


class _TreeSpans(Spans[ForkTree]):
    """A VM and its copies are on one host."""

    def read(self, answer: PeerAnswer) -> ForkTree:
        return msgspec.json.decode(answer.body, type=ForkTree)

    def size(self, result: ForkTree) -> int:
        return len(result.nodes)

    def next_cursor(self, result: ForkTree) -> str | None:
        return result.next_cursor

    def join(self, parts: Sequence[Part[ForkTree]], next_cursor: Any, whole: bool, fleet: Fleet) -> ForkTree:
        return ForkTree(
            nodes=[node for _, tree in parts for node in tree.nodes],
            edges=[edge for _, tree in parts for edge in tree.edges],
            event_id=event_id_of(fleet, {member.number: tree.event_id for member, tree in parts}),
            next_cursor=next_cursor,
        )


@TABLE.operation(
    "GET /api/v1/forks",
    permission=Permission.VIEW,
    answer="A page of it",
    errors=(503,),
    spans=_TreeSpans(ForkTree, None),
    tool=Tool(
        "forks_list",
        "Show which VM is a copy of which",
        "See which VMs were forked from which, which snapshots were taken of them, and which VMs were restored from "
        "those, also of what is deleted meanwhile: nodes, and the edge that leads to each copy.",
    ),
)
async def list_forks(
    context: Context,
    *,
    limit: Annotated[
        int, Integer(help="At most so many nodes; default 100", minimum=1, maximum=1000, tool_maximum=100)
    ] = 100,
    cursor: Annotated[str, Text(help="The `next_cursor` of the page before")] = "",
) -> ForkTree:
    """Show the fork tree: VMs and snapshots that are copies or were copied, sources first.

    It also has those that are deleted, as long as events are kept. A VM that is no copy and was not copied is not in
    it.
    """
    projection, listed = context.deps.store.projection, context.listed
    rows = [row for row in projection.rows() if listed in (None, row.project)]
    snapshots = [one for one in projection.snapshots.values() if listed in (None, one.project) and one.is_listed]
    sees, last = projection.sees(listed), projection.last_event

    def page(past: Iterator[Event]) -> ForkTree:
        return fork_tree(rows, snapshots, filter(sees, past), str(last)).page(cursor, limit)

    return await context.deps.store.events.fold(FORK_EVENTS, last, page)
