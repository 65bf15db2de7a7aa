"""A host's membership: its record, its number and its load, which only that host writes.

A host is identified by an id in its state directory. So a second host with the same name, or a copy of a host's disk
that runs elsewhere, is not taken for the same host: its record has another id, or its sign of life already exists.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Annotated, TypeVar

import msgspec
import trio

from volant.concurrency import Backoff
from volant.model import EventId, HostFacts, HostLoad

from ._interface import (
    Compare,
    Entry,
    EtcdError,
    EtcdRefused,
    KeyValues,
    Step,
    Transaction,
    Wrapper,
    absent,
    put,
    unchanged,
)
from ._mirror import Mirror


class Gate(Wrapper):
    """Refuses changes while it is closed."""

    def __init__(self, etcd: KeyValues) -> None:
        super().__init__(etcd)
        self._under_way = 0
        self._idle = trio.Event()
        self._refusal: str | None = None

    async def close(self, refusal: str) -> None:
        """Refuses changes from now on, and waits for the end of running ones.

        :param refusal: why they are refused, for people
        """
        self._refusal = refusal
        while self._under_way:
            await self._idle.wait()

    def open(self) -> None:
        """Accepts changes again."""
        self._refusal = None

    async def transact(
        self, conditions: Sequence[Compare], steps: Sequence[Step], otherwise: Sequence[Step] = ()
    ) -> Transaction:
        if self._refusal is not None:
            raise EtcdRefused(self._refusal)
        self._under_way += 1
        try:
            return await self._etcd.transact(conditions, steps, otherwise)
        finally:
            self._under_way -= 1
            self._idle.set()
            self._idle = trio.Event()


T = TypeVar("T")

HOSTS, NUMBERS, LOADS = "hosts/", "numbers/", "load/"
MAX_HOSTS = 999
IDS_OF_ONE = 10**9
"""The size of each host's own block of VM ids, so that no two VMs of a fleet have the same id."""
OLDEST = EventId("", 0)
"""The oldest stored event."""
_LOOK_S = 2.0
"""The interval of checks of facts and load."""
_LOAD_EVERY_S = 10.0
"""The interval for writing small changes of the load, which would otherwise fill etcd's history."""
_RETRY_S, _RETRY_MAX_S = 0.5, 10.0


class HostRecord(msgspec.Struct, frozen=True):
    """A host's record, written by itself."""

    id: str
    number: Annotated[int, msgspec.Meta(ge=1, le=MAX_HOSTS)]
    facts: HostFacts
    since: str = ""
    """The event with which it joined; earlier events do not belong to the fleet."""


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A host, with the data for following its events and listing its objects."""

    number: int
    name: str
    is_up: bool
    vms: int
    """The number from its last report."""
    since: EventId
    """The event with which it joined; an empty epoch means the oldest event."""
    head: EventId
    """Its newest event, from its last report. It may have newer ones."""


class NameInUse(Exception):
    """Another host of the fleet has this name."""


class Membership:
    """Writes the record and the load of one host.

    :param id: the id of this host, the same after each restart
    :param take_number: called with the number of this host before the fleet may know its VMs
    """

    def __init__(
        self,
        etcd: KeyValues,
        mirror: Mirror,
        name: str,
        id: str,
        *,
        facts: Callable[[], HostFacts],
        load: Callable[[], HostLoad],
        take_number: Callable[[int], Awaitable[None]],
    ) -> None:
        self._etcd = etcd
        self._mirror = mirror
        self._name = name
        self._id = id
        self._facts = facts
        self._load = load
        self._take_number = take_number
        self._written: HostRecord | None = None
        self._reported: HostLoad | None = None
        self._reported_at = 0.0
        self.joined = trio.Event()
        """Set when the fleet has the record of this host."""
        self.trouble: str | None = None
        """Why the fleet lacks this host's record or has an old one; None if it is current."""

    async def keep(self) -> None:
        """Joins, and keeps record and load current until cancelled."""
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        while True:
            try:
                while not await self._has_record():
                    await self._write_record()
                await self._report()
            except (EtcdError, NameInUse) as error:
                self.trouble = str(error)
                # The written record may have been deleted in the meantime.
                self._written = self._reported = None
                await backoff.pause()
                continue
            self.trouble = None
            backoff.reset()
            await trio.sleep(_LOOK_S)

    async def _has_record(self) -> bool:
        """Returns whether the fleet has the present facts of this host. :raises NameInUse: :raises EtcdError:"""
        # The written record is missing if etcd was restored, or has lost its data.
        seen = record_of(self._mirror.section("hosts").get(self._name))
        if seen is not None and seen == self._written and seen.facts == self._facts():
            return True
        known = record_of(await self._etcd.get(HOSTS + self._name))
        if known is None or known.facts != self._facts():
            return False
        self._check_id(known)
        await self._take_number(known.number)
        self._written = known
        self.joined.set()
        return True

    async def _write_record(self) -> None:
        """Writes the record, unless it was changed in between. The first record gets a unique number.

        :raises NameInUse: :raises EtcdError: it does not answer, or has a record that can't be read
        """
        entry = await self._etcd.get(HOSTS + self._name)
        known = record_of(entry)
        if entry is not None and known is None:
            # It may be another host's, of a version that writes other records.
            raise EtcdRefused(
                f"the record of this host in etcd, {HOSTS}{self._name} under fleet_prefix, can't be read: another "
                f"version of volantd, or another program, has written it. Run that version, or, if no other host is "
                f"named {self._name!r}, remove it on another host with `volar hosts delete {self._name}`"
            )
        since = known.since if known is not None else self._load().event_id
        conditions = [absent(HOSTS + self._name) if entry is None else unchanged(entry)]
        steps = []
        if known is not None:
            self._check_id(known)
            number = known.number
        else:
            number = await self._free_number()
            conditions.append(absent(f"{NUMBERS}{number}"))
            steps.append(put(f"{NUMBERS}{number}", self._name.encode()))
        record = HostRecord(self._id, number, self._facts(), since)
        await self._etcd.transact(conditions, [put(HOSTS + self._name, msgspec.json.encode(record)), *steps])

    async def _free_number(self) -> int:
        taken = {entry.key for entry in (await self._etcd.list(NUMBERS))[0]}
        for number in range(1, MAX_HOSTS + 1):
            if f"{NUMBERS}{number}" not in taken:
                return number
        raise EtcdError(f"the fleet has had {MAX_HOSTS} hosts, and has no number for another one")

    def _check_id(self, known: HostRecord) -> None:
        check_id(self._name, known, self._id)

    async def _report(self) -> None:
        load = self._load()
        now = trio.current_time()
        if load == self._reported and self._name in self._mirror.section("load"):
            return
        if (
            self._reported is not None
            and now - self._reported_at < _LOAD_EVERY_S
            and not _differs(self._reported, load)
        ):
            return
        await self._etcd.transact([], [put(LOADS + self._name, msgspec.json.encode(load))])
        self._reported, self._reported_at = load, now


def check_id(name: str, known: HostRecord, id: str) -> None:
    """Checks that a name belongs to the host with this id. :raises NameInUse: it belongs to another host."""
    if known.id != id:
        raise NameInUse(
            f"another host of the fleet is named {name!r}; give this one another name (fleet_host), or, if it replaces "
            f"that one, run `volar hosts delete {name}` first"
        )


async def known_hosts(etcd: KeyValues) -> Mapping[str, HostRecord]:
    """Returns the hosts of a fleet, by name. :raises EtcdError:"""
    found, _ = await etcd.list(HOSTS)
    return {entry.key.removeprefix(HOSTS): record for entry in found if (record := record_of(entry)) is not None}


def record_of(entry: Entry | None) -> HostRecord | None:
    """Returns the record in a key; None if there is none, or it is malformed."""
    return None if entry is None else _decoded(entry, HostRecord)


def member_of(name: str, record: HostRecord, load: HostLoad, *, is_up: bool) -> Member:
    """Returns a host as a member."""
    since = EventId.parse(record.since) or OLDEST
    return Member(
        number=record.number,
        name=name,
        is_up=is_up,
        vms=load.vms,
        since=since,
        head=EventId.parse(load.event_id) or since,
    )


def load_of(entry: Entry | None) -> HostLoad:
    """Returns the load in a key; without one, the load of an idle host without free memory."""
    found = None if entry is None else _decoded(entry, HostLoad)
    return found or HostLoad()


def _decoded(entry: Entry, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(entry.value, type=kind)
    except (msgspec.MsgspecError, ValueError):
        return None


def _differs(before: HostLoad, now: HostLoad) -> bool:
    """Returns whether a placement would be decided differently."""
    least = max(before.free_memory_mb, now.free_memory_mb) // 10
    return before.vms != now.vms or abs(before.free_memory_mb - now.free_memory_mb) > least
