"""The fork tree: VMs, snapshots, and the copies made of them."""

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
    """A VM and its copies are on the same host."""

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
    answer="A page of the tree",
    errors=(503,),
    spans=_TreeSpans(ForkTree, None),
    tool=Tool(
        "forks_list",
        "Show the fork tree",
        "See which VMs were forked from which, which snapshots were taken of them, and which VMs were restored from "
        "these, including deleted ones: nodes, and the edge that leads to each copy.",
    ),
)
async def list_forks(
    context: Context,
    *,
    limit: Annotated[
        int, Integer(help="Maximum number of nodes; default 100", minimum=1, maximum=1000, tool_maximum=100)
    ] = 100,
    cursor: Annotated[str, Text(help="The `next_cursor` of the previous page")] = "",
) -> ForkTree:
    """Show the fork tree: VMs and snapshots that are copies or were copied, sources first.

    It includes deleted ones, as long as their events are kept, and leaves out VMs that are no copy and were never
    copied.
    """
    projection, listed = context.deps.store.projection, context.listed
    rows = [row for row in projection.rows() if listed in (None, row.project)]
    snapshots = [one for one in projection.snapshots.values() if listed in (None, one.project) and one.is_listed]
    sees, last = projection.sees(listed), projection.last_event

    def page(past: Iterator[Event]) -> ForkTree:
        return fork_tree(rows, snapshots, filter(sees, past), str(last)).page(cursor, limit)

    return await context.deps.store.events.fold(FORK_EVENTS, last, page)
