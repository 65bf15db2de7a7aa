"""Sends VMs to other hosts for moves and replicas, with memory and disk: finds a host for each, and sends the chunks
that it lacks. The other end is `_arrivals`, and `docs/explanation/fleet.md` has the steps.
"""

from __future__ import annotations

import platform
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import TypeVar

import msgspec
import trio

from volant.chunks import ChunkError, ChunkReader, Place, check_chunk
from volant.concurrency import Backoff
from volant.fleet import Fleet, Wanted, place
from volant.model import Leaving, Placement, Problem, Snapshot, TakeSnapshot, VmRow, is_at_rest
from volant.routing import Handler
from volant.transfer import Bases, Transfers, encode
from volant.vm import Vms

from ._arrivals import (
    ARRIVALS,
    CHUNKS,
    DOCUMENTS,
    HEADERS,
    NO_MOVE,
    Arrival,
    WantArrival,
    WantChunk,
    WantDocument,
    body_of,
)

_POLL_S, _POLL_MAX_S = 0.05, 0.2
"""The shortest and the longest interval of polls of a VM's progress. The VM is paused in the meantime, and a poll costs
both hosts a millisecond."""
ADMIT_S = 1800.0
"""Maximum time for a host to fetch the base files of a VM, which keeps running."""
_ASK_S = 10.0
_SILENT_S = 15.0
"""A host that has not answered for this time gets no VM."""
_BUSY_S = 60.0
"""Maximum wait of a snapshot until other VMs have been copied."""
_RETRY_S, _RETRY_MAX_S = 0.2, 10.0
T = TypeVar("T")

Note = Callable[[Arrival], None]
"""A callback for the progress of a VM."""


class Outgoing(msgspec.Struct, frozen=True):
    """A snapshot that other hosts fetch."""

    snapshot: Snapshot
    document: bytes
    reader: ChunkReader
    places: Mapping[str, Place]
    """The places of its chunks, by their digests."""


class Sending:
    """The snapshots that this host sends to others.

    :param fleet, vms, transfers: return parts of the daemon that are created later
    """

    def __init__(
        self, host_name: str, *, fleet: Callable[[], Fleet], vms: Callable[[], Vms], transfers: Callable[[], Transfers]
    ) -> None:
        self._name = host_name
        self._fleet = fleet
        self._vms = vms
        self._transfers = transfers
        self._sent: dict[str, Outgoing] = {}
        """Snapshots by the ids of moves and copies."""

    @property
    def handlers(self) -> Mapping[str, Handler]:
        """Returns the handlers for requests of other hosts."""
        return {DOCUMENTS: self._answer_document, CHUNKS: self._answer_chunk}

    def hosts_for(self, row: VmRow) -> list[str]:
        """Returns the hosts that could run a VM of this host, as far as is known, best first.

        :raises Problem: 503, none could
        """
        fleet = self._fleet()
        own = fleet.get(self._name)
        wanted = Wanted(
            memory_mb=0 if is_at_rest(row) else row.memory_mb,
            architecture=platform.machine(),
            placement=row.placement or Placement(),
        )
        others = [each for each in fleet.hosts() if each.name != self._name and each.accelerator == own.accelerator]
        return place(others, wanted, here=self._name, labels_on=partial(fleet.labels_on, project=row.project))

    async def admit(self, row: VmRow, leaving: Leaving, bases: Bases, note: Note) -> None:
        """Waits until a host confirms that it could run a VM, which keeps running. :raises Problem: it can't."""
        want = WantArrival(vm=msgspec.structs.replace(row, leaving=leaving), bases=bases, begin=False)
        try:
            with trio.fail_after(ADMIT_S):
                await self._until(leaving.to_host, want, "admitted", note)
        except trio.TooSlowError:
            why = f"it has not got what the VM relies on within {ADMIT_S:g} s"
            raise Problem(503, "host-slow", why, vm=row.name) from None

    async def take_snapshot(self, row: VmRow, name: str, text: str, *, move: str) -> Snapshot:
        """Returns a snapshot of a VM, for a move or a replica. Waits for other VMs that are being copied.

        :raises Problem: 409, it can't be copied; 503
        """
        take = TakeSnapshot(name=name, description=text)
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        ends_at = trio.current_time() + _BUSY_S
        while True:
            try:
                return await self._vms().copies.take_snapshot(row.key, take, move=move)
            except Problem as problem:
                if problem.code != "checkpoints-busy" or trio.current_time() > ends_at:
                    raise
            await backoff.pause()

    @asynccontextmanager
    async def opened(self, snapshot: Snapshot) -> AsyncIterator[Outgoing]:
        """Describes a snapshot, and holds its files open for the block. :raises TransferError: :raises ChunkError:"""
        async with self._transfers().sending(snapshot) as sending:
            places = zip(sending.document.files.chunks, sending.document.files.places(), strict=True)
            found = {digest: each[0] for digest, each in places}
            yield Outgoing(snapshot, encode(sending.document), sending.reader, found)

    async def send(self, outgoing: Outgoing, leaving: Leaving, bases: Bases, note: Note) -> None:
        """Waits until another host has received a whole snapshot. :raises Problem: it does not."""
        self._sent[leaving.id] = outgoing
        try:
            sent = msgspec.structs.replace(outgoing.snapshot.vm, leaving=leaving)
            await self._until(leaving.to_host, WantArrival(vm=sent, bases=bases, begin=True), "ready", note)
        finally:
            self._sent.pop(leaving.id, None)

    async def _until(self, host: str, want: WantArrival, phase: str, note: Note) -> None:
        """Waits until a VM on its way to another host has reached a phase. :raises Problem: it does not."""
        body, heard_at = msgspec.json.encode(want), trio.current_time()
        backoff = Backoff(_POLL_S, _POLL_MAX_S)
        while True:
            try:
                answer = await self._fleet().peers.ask(host, ARRIVALS, HEADERS, timeout_s=_ASK_S, body=body)
            except Problem:
                # Its daemon may be restarted, and goes on with what has arrived.
                if trio.current_time() - heard_at > _SILENT_S or not self._fleet().is_up(host):
                    raise
            else:
                heard_at = trio.current_time()
                try:
                    arrival = msgspec.json.decode(body_of(answer), type=Arrival)
                except (msgspec.MsgspecError, ValueError) as error:
                    raise Problem(503, "host-unreachable", f"the host {host!r} has another version: {error}") from None
                note(arrival)
                if arrival.phase == phase:
                    return
            await backoff.pause()

    # Requests of other hosts

    async def _answer_document(self, body: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return self._sent_of(_decoded(body, WantDocument).move).document

    async def _answer_chunk(self, body: bytes) -> bytes:
        want = _decoded(body, WantChunk)
        sent = self._sent_of(want.move)
        found = sent.places.get(want.digest)
        if found is None:
            raise Problem(404, "no-chunk", "the snapshot has no such chunk")
        try:
            data = await sent.reader.read(found)
            # The content may have changed since its description, or the disk fails.
            check_chunk(want.digest, data)
        except (OSError, ChunkError) as error:
            raise Problem(503, "snapshot-damaged", f"the snapshot can't be read: {error}") from error
        return data

    def _sent_of(self, move: str) -> Outgoing:
        """Returns a snapshot that is being sent. :raises Problem: 404, there is no such move."""
        sent = self._sent.get(move)
        if sent is None:
            raise Problem(404, NO_MOVE, "no VM moves from here with that id now")
        return sent


def _decoded(body: bytes, of: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=of)
    except (msgspec.MsgspecError, ValueError) as error:
        raise Problem(400, "malformed-request", f"another version asks for it: {error}") from None
