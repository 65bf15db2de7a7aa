"""VMs that arrive at this host, as moves or replicas: it receives the data that it lacks.

The sending host drives the arrival by polling its progress. `docs/explanation/fleet.md` has the steps.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Literal

import msgspec
import trio

from volant.chunks import ChunkError, Received, Source
from volant.fleet import EtcdError, Fleet, PeerAnswer
from volant.journal import Store
from volant.model import MOVED, REPLICA, Key, Leaving, Problem, Snapshot, VmRow
from volant.routing import Handler
from volant.transfer import Bases, Transfer, TransferError, Transfers
from volant.vm import Vms

ARRIVALS, DOCUMENTS, CHUNKS = "/fleet/v1/arrivals", "/fleet/v1/documents", "/fleet/v1/chunks"
"""Paths at the port for other hosts."""
HEADERS = ((b"host", b"localhost"), (b"content-type", b"application/json"))
_MOST = 4
"""Maximum number of VMs that arrive at a time."""
_REPLICAS = 2
"""Maximum number of replicas that are received at a time. Others wait, at most two for each other host."""
_UNASKED_S = 30.0
"""An arrival that was not polled for this time is abandoned; its data is kept for the next attempt."""
_LOOK_S = 2.0
_ASK_S = 60.0
_RETRY_S = 0.5
NO_MOVE = "no-move"
_COMES_BACK = ("host-unreachable", NO_MOVE)
"""Error codes of a daemon that is down, or has just been started."""
_logger = logging.getLogger("volant.fleet")


class WantArrival(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a request to receive a VM or its replica, or to report the progress. The answer is an `Arrival`."""

    vm: VmRow
    """The row, with its move (`leaving`)."""
    bases: Bases
    """The base files that it needs."""
    begin: bool
    """Whether a snapshot of it is ready to be fetched. Otherwise this host reports whether it could run the VM."""


class Arrival(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a VM on its way to this host."""

    phase: Literal["preparing", "admitted", "copying", "ready"]
    """`admitted`: this host can run the VM; `ready`: it has received all of it."""
    done_bytes: int = 0
    total_bytes: int = 0
    moved_bytes: int = 0


class WantDocument(msgspec.Struct, frozen=True):
    """The body of a request for the document of a moving snapshot."""

    move: str


class WantChunk(msgspec.Struct, frozen=True):
    """The body of a request for a chunk of a snapshot; the answer is its content."""

    move: str
    digest: str


class _Arriving(msgspec.Struct, eq=False):
    """An arriving VM."""

    want: WantArrival
    leaving: Leaving
    transfer: Transfer
    asked_at: float
    phase: Literal["preparing", "admitted", "copying", "ready"] = "preparing"
    problem: Problem | None = None
    begun: trio.Event = msgspec.field(default_factory=trio.Event)
    scope: trio.CancelScope = msgspec.field(default_factory=trio.CancelScope)

    def view(self) -> Arrival:
        progress = self.transfer.progress
        return Arrival(
            phase=self.phase,
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            moved_bytes=progress.moved_bytes,
        )


class Arrivals:
    """The VMs that arrive at this host.

    :param fleet, vms, transfers: return parts of the daemon that are created later
    """

    def __init__(
        self, store: Store, *, fleet: Callable[[], Fleet], vms: Callable[[], Vms], transfers: Callable[[], Transfers]
    ) -> None:
        self._store = store
        self._fleet = fleet
        self._vms = vms
        self._transfers = transfers
        self._arriving: dict[str, _Arriving] = {}
        """Arriving VMs by the ids of their moves."""
        self._replicas = trio.CapacityLimiter(_REPLICAS)
        self._nursery: trio.Nursery | None = None

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """Returns the handlers for requests of other hosts."""
        return {ARRIVALS: self._answer}

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receives VMs until cancelled, and abandons arrivals that are not polled any more."""
        async with trio.open_nursery() as self._nursery:
            task_status.started()
            try:
                while True:
                    await trio.sleep(_LOOK_S)
                    for move, arriving in list(self._arriving.items()):
                        if trio.current_time() - arriving.asked_at > _UNASKED_S:
                            arriving.scope.cancel()
                            self._arriving.pop(move, None)
            finally:
                self._arriving.clear()
                self._nursery = None

    def has(self, move: str) -> bool:
        """Returns whether a VM of that move is arriving."""
        return move in self._arriving

    async def start(self, key: Key, snapshot: str, epoch: int) -> None:
        """Continues a VM that this host has received. :raises Problem: it can't now."""
        found = self._store.projection.snapshots.get(Key(key.project, snapshot))
        row = self._store.projection.get(key)
        if row is not None and row.arrived and snapshot in (f"{MOVED}{row.arrived}", f"{REPLICA}{row.arrived}"):
            # It runs already, and what it was started from may be gone.
            return
        if found is None or found.vm.key != key:
            raise Problem(
                503, "snapshot-gone", f"the snapshot {snapshot!r}, from which {key.name!r} is to go on, is gone"
            )
        await self._vms().arrive(found, epoch)

    # Requests of other hosts

    async def _answer(self, body: bytes) -> bytes:
        try:
            want = msgspec.json.decode(body, type=WantArrival)
        except (msgspec.MsgspecError, ValueError) as error:
            raise Problem(400, "malformed-request", f"the request was written by another version: {error}") from None
        leaving = want.vm.leaving
        if leaving is None or self._nursery is None:
            raise Problem(503, "daemon-starting", "no VM can arrive now", retry_after_s=2)
        arriving = self._arriving.get(leaving.id)
        if arriving is None:
            if not leaving.replica and sum(not each.leaving.replica for each in self._arriving.values()) >= _MOST:
                raise Problem(503, "too-many-moves", f"{_MOST} VMs are arriving already", retry_after_s=10)
            transfer = Transfer("pull", want.vm.project, leaving.arrival, f"host {leaving.from_host}")
            arriving = _Arriving(want, leaving, transfer, trio.current_time())
            self._arriving[leaving.id] = arriving
            self._nursery.start_soon(self._run, arriving)
        arriving.asked_at = trio.current_time()
        if want.begin and not arriving.begun.is_set():
            arriving.want = want
            arriving.begun.set()
        if arriving.problem is not None:
            del self._arriving[leaving.id]
            raise arriving.problem
        return msgspec.json.encode(arriving.view())

    async def _run(self, arriving: _Arriving) -> None:
        try:
            with arriving.scope:
                await self._receive(arriving)
        except (TransferError, ChunkError) as error:
            arriving.problem = Problem(503, error.code.replace("_", "-"), str(error))
        except (EtcdError, OSError) as error:
            arriving.problem = Problem(503, "move-failed", str(error))
        except Problem as problem:
            arriving.problem = problem
        if arriving.problem is not None:
            what = arriving.want.vm.name
            _logger.warning("VM %s does not arrive from %s: %s", what, arriving.leaving.from_host, arriving.problem)

    async def _receive(self, arriving: _Arriving) -> None:
        vm, leaving, transfers = arriving.want.vm, arriving.leaving, self._transfers()
        if self._arrived(vm.key, leaving) is None:
            self._vms().check_arrival(vm)
            await transfers.obtain(vm, arriving.want.bases)
        arriving.phase = "admitted"
        await arriving.begun.wait()
        async with self._replicas if leaving.replica else nullcontext():
            arriving.phase = "copying"
            if self._arrived(vm.key, leaving) is None:
                source = _HostSource(self._fleet(), transfers, leaving)
                document = await source.ask(DOCUMENTS, WantDocument(leaving.id))
                await transfers.move_in(document, arriving.want.vm, source, arriving.transfer)
        await self._fleet().claims.note_arrival(leaving.id)
        arriving.phase = "ready"

    def _arrived(self, vm: Key, leaving: Leaving) -> Snapshot | None:
        """Returns the snapshot of an arrived VM, if it is complete."""
        snapshot = self._store.projection.snapshots.get(Key(vm.project, leaving.arrival))
        return snapshot if snapshot is not None and snapshot.status == "ready" else None


class _HostSource(Source):
    """The host from which a VM arrives, as the source of its chunks."""

    def __init__(self, fleet: Fleet, transfers: Transfers, leaving: Leaving) -> None:
        self._fleet = fleet
        self._transfers = transfers
        self._leaving = leaving

    async def get(self, digest: str, length: int) -> Received:
        data = await self.ask(CHUNKS, WantChunk(self._leaving.id, digest))
        await self._transfers.spend(len(data))
        return Received(data, len(data))

    async def ask(self, path: str, want: WantDocument | WantChunk) -> bytes:
        """Repeats a request until the host answers: its daemon may be restarting. :raises Problem: it refuses."""
        body = msgspec.json.encode(want)
        while True:
            try:
                host = self._leaving.from_host
                return body_of(await self._fleet.peers.ask(host, path, HEADERS, timeout_s=_ASK_S, body=body))
            except Problem as problem:
                if problem.code not in _COMES_BACK:
                    raise
                await trio.sleep(_RETRY_S)


def body_of(answer: PeerAnswer) -> bytes:
    """Returns the body of another host's answer. :raises Problem: it refuses."""
    if answer.status == 200:
        return answer.body
    try:
        said = msgspec.json.decode(answer.body, type=dict[str, object])
    except (msgspec.MsgspecError, ValueError):
        said = {}
    code = str(said.get("type", "")).rpartition(":")[2] or "host-unreachable"
    raise Problem(answer.status, code, str(said.get("detail", "")) or f"the host answers with {answer.status}")
