"""The fork tree equals what was done, over restarts, as long as events are kept."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from tests.journal.kit import Bench, ClockHost, events_after, running
from tests.names import named
from volant.journal import BeginSnapshot, FinishSnapshot, ForkRow, RemoveSnapshot, RestoreRow
from volant.model import (
    DEFAULT_PROJECT,
    FORK_EVENTS,
    Event,
    ForkEdge,
    ForkNode,
    ForkTree,
    ForkVm,
    Problem,
    RestoreVm,
    Snapshot,
    Status,
    TakeSnapshot,
    VmRow,
    fork_tree,
)


async def page(bench: Bench, cursor: str = "", limit: int = 1000) -> ForkTree:
    """Returns a page of the tree, as the operation does."""
    projection = bench.store.projection
    last, rows, snapshots = projection.last_event, projection.rows(), list(projection.snapshots.values())

    def use(past: Iterator[Event]) -> ForkTree:
        return fork_tree(rows, snapshots, past, str(last)).page(cursor, limit)

    return await bench.store.events.fold(FORK_EVENTS, last, use)


async def only_the_newest_event_is_kept(bench: Bench) -> None:
    log = bench.store.events
    with trio.fail_after(10):
        while log.oldest != log.newest:  # noqa: ASYNC110 - it is the disk that tells
            await trio.sleep(0.05)


class Model:
    """What was done to a journal, and the tree that follows."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.host = ClockHost()
        self.rows: dict[str, VmRow] = {}
        """VMs that are there, by the ids of their nodes."""
        self.snapshots: dict[str, Snapshot] = {}
        self.nodes: dict[str, ForkNode] = {}
        self.edges: dict[str, ForkEdge] = {}
        self.count = 0

    def name(self) -> str:
        """Returns a name that is free, and may have been another's before."""
        taken = {node.name for node in self.nodes.values() if node.status is not None}
        return next(name for name in map("n{}".format, range(1000)) if name not in taken)

    def add_vm(self, row: VmRow) -> str:
        node = f"vm-{row.id}"
        self.rows[node] = row
        self.nodes[node] = ForkNode(
            id=node, kind="vm", name=row.name, status=row.status.value, created_at=self.host.clock.now()
        )
        return node

    def add_edge(self, source: str, target: str, kind: str, paused_ms: float | None) -> None:
        at = self.nodes[target].created_at
        edge = {"source": source, "target": target, "kind": kind, "at": at, "paused_ms": paused_ms}
        self.edges[target] = msgspec.convert(edge, ForkEdge)

    def gone(self, node: str) -> None:
        self.nodes[node] = msgspec.structs.replace(self.nodes[node], status=None, deleted_at=self.host.clock.now())

    async def run(self, bench: Bench) -> str:
        """Makes and starts a VM that is no copy."""
        row = await bench.create(self.name())
        return await self.started(bench, self.add_vm(row))

    async def started(self, bench: Bench, node: str) -> str:
        row = await bench.to(self.rows[node], Status.STARTING, Status.RUNNING)
        self.rows[node] = row
        self.nodes[node] = msgspec.structs.replace(self.nodes[node], status="running")
        return node

    async def step(self, bench: Bench) -> None:
        """Does one thing at random."""
        self.host.pass_time(seconds=self.random.randrange(100))
        paused_ms = self.random.randrange(1000) / 8
        running = [node for node in self.rows if self.nodes[node].status == "running"]
        kind = self.random.choice(
            ["run", "start", "fork", "fork", "take", "take", "fail", "restore", "rm", "rm", "rm-snapshot"]
        )
        match kind:
            case "run":
                await self.run(bench)
            case "start" if waiting := [node for node in self.rows if self.nodes[node].status == "pending"]:
                await self.started(bench, self.random.choice(waiting))
            case "fork" if running:
                source, self.count = self.random.choice(running), self.count + 1
                request = ForkVm(count=self.random.randint(1, 3))
                message = ForkRow(self.rows[source].id, request, f"fork-{self.count}", paused_ms=paused_ms)
                for row in await bench.ask(message):
                    self.add_edge(source, self.add_vm(row), "fork", paused_ms)
            case "take" | "fail" if running:
                source, self.count = self.random.choice(running), self.count + 1
                snapshot_id, name = f"id-{self.count}", self.name()
                await bench.ask(BeginSnapshot(self.rows[source].id, TakeSnapshot(name=name), snapshot_id))
                if kind == "fail":
                    await bench.ask(RemoveSnapshot(named(name), snapshot_id))
                    return
                created_at = self.host.clock.now()
                self.host.pass_time(seconds=3)
                snapshot = await bench.ask(FinishSnapshot(named(name), snapshot_id, paused_ms, 4096))
                node = f"snapshot-{snapshot_id}"
                self.snapshots[node] = snapshot
                self.nodes[node] = ForkNode(id=node, kind="snapshot", name=name, status="ready", created_at=created_at)
                self.add_edge(source, node, "snapshot", paused_ms)
            case "restore" if self.snapshots:
                source = self.random.choice(list(self.snapshots))
                wanted = RestoreVm(name=self.name(), from_snapshot=self.snapshots[source].name)
                row = await bench.ask(RestoreRow(wanted, DEFAULT_PROJECT))
                self.add_edge(source, self.add_vm(row), "restore", None)
            case "rm" if self.rows:
                node = self.random.choice(list(self.rows))
                await bench.delete(self.rows.pop(node))
                self.gone(node)
            case "rm-snapshot" if self.snapshots:
                node = self.random.choice(list(self.snapshots))
                snapshot = self.snapshots[node]
                if any(row.checkpoint == snapshot.checkpoint and row.status == "pending" for row in self.rows.values()):
                    with pytest.raises(Problem, match="is about to continue from snapshot"):
                        await bench.ask(RemoveSnapshot(snapshot.key, snapshot.id))
                    return
                await bench.ask(RemoveSnapshot(snapshot.key, snapshot.id))
                del self.snapshots[node]
                self.gone(node)

    async def check(self, bench: Bench) -> None:
        """The tree that is read in pages is the one that was made."""
        shown = await page(bench, limit=self.random.randint(1, 5))
        nodes, edges = list(shown.nodes), list(shown.edges)
        seen: set[str] = set()
        while True:
            assert {edge.target for edge in shown.edges} <= {node.id for node in shown.nodes}
            seen |= {node.id for node in shown.nodes}
            assert {edge.source for edge in shown.edges} <= seen, "a source comes before its copies"
            if shown.next_cursor is None:
                break
            shown = await page(bench, shown.next_cursor, self.random.randint(1, 5))
            nodes += shown.nodes
            edges += shown.edges
        assert {edge.target: edge for edge in edges} == self.edges
        assert len(edges) == len(self.edges)
        in_tree = self.edges.keys() | {edge.source for edge in self.edges.values()}
        assert {node.id: node for node in nodes} == {key: node for key, node in self.nodes.items() if key in in_tree}
        assert len(nodes) == len(in_tree)


@pytest.mark.parametrize("seed", range(1, 6))
async def test_the_tree_is_what_was_done_also_after_a_restart(path: Path, seed: int) -> None:
    model = Model(seed)
    for _ in range(4):
        async with running(path, host=model.host) as bench:
            await model.check(bench)
            for _ in range(20):
                await model.step(bench)
            await model.check(bench)
    kinds = {edge.kind for edge in model.edges.values()}
    assert kinds == {"fork", "snapshot", "restore"}
    assert {node.kind for node in model.nodes.values() if node.deleted_at is not None} == {"vm", "snapshot"}


async def test_the_deleted_stay_as_long_as_events_and_sources_as_long_as_copies(path: Path) -> None:
    model = Model(0)
    host = model.host
    async with running(path, host=host) as bench:
        root = await model.run(bench)
        (first,) = await bench.ask(ForkRow(model.rows[root].id, ForkVm(), "fork-a", paused_ms=8.0))
        await bench.delete(model.rows[root])
    host.pass_time(days=8)
    async with running(path, host=host) as bench:
        second = await bench.create("other")
        await only_the_newest_event_is_kept(bench)
        tree = await page(bench)
        assert [(node.id, node.name, node.status, node.created_at) for node in tree.nodes] == [
            (root, "n0", None, None),
            (f"vm-{first.id}", "n0-fork-1", "pending", first.created_at),
        ], "what is known of the source is what its copy knows"
        assert [(edge.source, edge.target, edge.paused_ms) for edge in tree.edges] == [(root, f"vm-{first.id}", 8.0)]
        await bench.delete(first)
        (_, shown) = (await page(bench)).nodes
        assert (shown.created_at, shown.deleted_at) == (first.created_at, host.clock.now())
        await bench.delete(second)
    host.pass_time(days=8)
    async with running(path, host=host) as bench:
        await bench.create("last")
        await only_the_newest_event_is_kept(bench)
        assert (await page(bench)).nodes == []


async def test_events_of_snapshots_name_their_vm_and_say_whether_it_is_there(path: Path) -> None:
    async with running(path) as bench:
        row = await bench.to(await bench.create("demo", labels={"team": "a"}), Status.STARTING, Status.RUNNING)
        newest = bench.store.events.newest
        for name in ("one", "two"):
            await bench.ask(BeginSnapshot(row.id, TakeSnapshot(name=name), f"id-{name}"))
            await bench.ask(FinishSnapshot(named(name), f"id-{name}", 12.5, 4096))
        await bench.ask(FinishSnapshot(named("two"), "id-two", 12.5, 4096))
        await bench.ask(RemoveSnapshot(named("one"), "id-one"))
        await bench.delete(row)
        await bench.ask(RemoveSnapshot(named("two"), "id-two"))
        found = [frame.event for frame in await events_after(bench.store.events, newest)]
        events = [(each.type, each.name, each.vm_id, each.status, each.snapshot) for each in found if each.snapshot_id]
        assert events == [
            ("SNAPSHOT_TAKEN", "demo", row.id, "running", "one"),
            ("SNAPSHOT_TAKEN", "demo", row.id, "running", "two"),
            ("SNAPSHOT_DELETED", "demo", row.id, "running", "one"),
            ("SNAPSHOT_DELETED", "demo", row.id, None, "two"),
        ]
        assert {each.paused_ms for each in found if each.snapshot_id} == {12.5}
        assert all(each.labels == {"team": "a"} for each in found)


async def test_a_copy_of_an_earlier_version_hangs_on_the_vm_of_its_snapshot(path: Path) -> None:
    async with running(path) as bench:
        row = await bench.to(await bench.create("demo"), Status.STARTING, Status.RUNNING)
        await bench.ask(BeginSnapshot(row.id, TakeSnapshot(name="warm"), "id"))
        await bench.ask(FinishSnapshot(named("warm"), "id", 12.5, 4096))
        copy = await bench.ask(RestoreRow(RestoreVm(name="again", from_snapshot="warm"), DEFAULT_PROJECT))
        assert copy.origin is not None
        old = msgspec.structs.replace(copy, origin=msgspec.structs.replace(copy.origin, snapshot_id=None))
        tree = fork_tree([row, old], [], [], "x-1").page("", 10)
        assert [(edge.source, edge.target, edge.kind) for edge in tree.edges] == [("vm-1", "vm-2", "restore")]


@pytest.mark.parametrize("cursor", ["x", "1", "-1-", "１-", "9" * 19 + "-", "vm-1"])
async def test_what_is_no_cursor_is_refused(path: Path, cursor: str) -> None:
    async with running(path) as bench:
        with pytest.raises(Problem) as refused:
            await page(bench, cursor)
    assert (refused.value.status, refused.value.field) == (400, "cursor")
