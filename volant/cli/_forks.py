"""`volar forks`: the fork tree."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator

import msgspec

from volant.model import ForkEdge, ForkNode, ForkTree

from ._options import listing
from ._output import Output, styled
from ._run import Session, command
from ._text import safe

_PAGE = 1000
_DONE = {"fork": "forked", "snapshot": "taken", "restore": "restored"}


@command(None, "forks")
@listing
async def forks(session: Session) -> None:
    """Show which VM was forked or restored from which, and the snapshots, as a tree.

    It includes deleted ones, as long as their events are kept, and leaves out VMs that are no copy and were never
    copied.
    """
    tree = page = await session.client.forks.list(limit=_PAGE)
    while page.next_cursor is not None:
        page = await session.client.forks.list(limit=_PAGE, cursor=page.next_cursor)
        tree = msgspec.structs.replace(
            tree, nodes=[*tree.nodes, *page.nodes], edges=[*tree.edges, *page.edges], next_cursor=None
        )
    if session.out.json:
        session.out.document(tree)
        return
    lines = (safe(node.name) for node in tree.nodes) if session.out.names else _lines(session.out, tree)
    for line in lines:
        session.out.line(line)
    if not tree.nodes:
        session.out.note("nothing was copied: 'volar vms fork NAME' forks a VM, 'volar vms snapshot NAME' keeps it")


def _lines(out: Output, tree: ForkTree) -> Iterator[str]:
    """Yields the lines of the tree. A chain of copies can be longer than Python's stack is deep."""
    copies: defaultdict[str, list[ForkNode]] = defaultdict(list)
    nodes = {node.id: node for node in tree.nodes}
    edges = {edge.target: edge for edge in tree.edges if edge.source in nodes}
    for node in tree.nodes:
        if node.id in edges:
            copies[edges[node.id].source].append(node)
    waiting = [(node, "", "") for node in reversed(tree.nodes) if node.id not in edges]
    while waiting:
        node, first, rest = waiting.pop()
        yield first + _line(out, node, edges.get(node.id))
        below = sorted(copies[node.id], key=_made_at, reverse=True)
        for position, copy in enumerate(below):
            is_last = position == 0
            waiting.append((copy, rest + ("└─ " if is_last else "├─ "), rest + ("   " if is_last else "│  ")))


def _made_at(node: ForkNode) -> float:
    return 0.0 if node.created_at is None else node.created_at.timestamp()


def _line(out: Output, node: ForkNode, edge: ForkEdge | None) -> str:
    name = styled(safe(node.name), None, sys.stdout, bold=True)
    facts = [name if node.kind == "vm" else f"snapshot {name}", out.status(node.status or "deleted")]
    if edge is not None and edge.at is not None:
        paused = f", paused for {edge.paused_ms:.0f} ms" if edge.paused_ms is not None else ""
        facts.append(f"{_DONE[edge.kind]} {edge.at:%Y-%m-%d %H:%M:%S}{paused}")
    elif node.created_at is not None:
        facts.append(f"created {node.created_at:%Y-%m-%d %H:%M:%S}")
    if node.deleted_at is not None:
        facts.append(f"deleted {node.deleted_at:%Y-%m-%d %H:%M:%S}")
    return "  ".join(facts)
