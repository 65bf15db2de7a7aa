"""One host's part in a fleet: it keeps its sign of life, knows the other hosts, and claims names for its VMs."""

from __future__ import annotations

import ssl
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec
import trio

from volant.model import (
    FleetView,
    HostFacts,
    HostLoad,
    HostMoves,
    HostView,
    Key,
    MoveView,
    Problem,
    Used,
    VmRecord,
    VmView,
    first_few,
    unreachable_view,
)

from ._agreement import CHANGED, USAGE
from ._alive import SignOfLife
from ._claims import REPLICAS, SPECS, Claims, ReplicaRecord, claim_of, replica_of
from ._definitions import JOINED, SEEN, Definitions
from ._fence import Fence, Successor, Vms
from ._forwarded import is_for_one_host
from ._interface import Compare, Entry, EtcdError, EtcdUnavailable, KeyValues, Step, absent, delete, put, unchanged
from ._membership import HOSTS, LOADS, Gate, Member, Membership, load_of, member_of, record_of
from ._mirror import Mirror
from ._names import KINDS, Names, key_of, text_of, unavailable
from ._peers import Peers
from ._records import RECORDS, Records
from ._replicas import Replicas

_ALIVE, _DRAINING = "alive/", "draining/"
_HAS_MOVES = "while VMs move to other hosts, it is not known which of them are this host's"
SLACK_S = 5.0
"""How long a sign of life must be missing before another host starts its VMs. See docs/explanation/fleet.md."""
_SEEN_S = 5.0
_FIRST_READ_S = 2.0
_AT_ONCE = 30
"""Names freed in one transaction, with up to four steps for each: etcd allows 128."""
_DELETE_TRIES = 20
"""Attempts to delete a host, as changes of others may come first."""
_UNKNOWN = HostFacts(address="", version="", architecture="", cpu_cores=0, memory_mb=0)
"""The facts of a host whose record was written by another version."""


class FleetSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a host in its fleet."""

    host: str
    """The host's name."""
    id: str
    """The host's id, unique and the same after each restart."""
    ttl_s: int = 15
    """The seconds for which its sign of life lasts."""


class _Draining(msgspec.Struct, frozen=True):
    """The value of a host that is being drained."""

    since: datetime
    keep_vms: bool = False
    """Whether its VMs stay."""


class Fleet:
    """The fleet as one host sees it, which asks etcd only for changes.

    :param facts, load: return the facts and the load of this host
    :param there: return the named objects of this host, by kind: `vms`, `snapshots`, `volumes`
    :param rows: returns the VMs of this host, with the data for other hosts
    :param take_number: called with the number of this host, before the fleet may know its VMs
    :param context: for connections to other hosts
    :param definitions: creates the keeper of the definitions
    :param vms: the movable VMs of this host, and the start of other hosts' VMs; None for neither
    :param lasts: stores until when they may run, for the watchdog; `until` returns the value of an earlier daemon
    :param leaving: returns the VMs of this host that are moving to others; `moves` has the moves of its VMs when it is
        drained
    :param now: the time of day; `boottime` is a clock in seconds that can't be set and continues while the host sleeps
    """

    def __init__(
        self,
        etcd: KeyValues,
        settings: FleetSettings,
        *,
        facts: Callable[[], HostFacts],
        load: Callable[[], HostLoad],
        there: Mapping[str, Callable[[], Collection[Key]]],
        rows: Callable[[], Iterable[tuple[Key, VmRecord]]],
        take_number: Callable[[int], Awaitable[None]],
        new_id: Callable[[], str],
        now: Callable[[], datetime],
        boottime: Callable[[], float],
        context: ssl.SSLContext,
        definitions: Callable[[KeyValues, Mirror], Definitions],
        vms: Vms | None = None,
        lasts: Callable[[float], None] = lambda until: None,
        until: Callable[[], float | None] = lambda: None,
        leaving: Callable[[], Collection[Key]] = lambda: (),
        moves: Callable[[], Sequence[MoveView]] = lambda: (),
    ) -> None:
        self._leaving = leaving
        self._moves = moves
        self._etcd = etcd
        self._gate = Gate(etcd)
        self._now = now
        self._there = there
        self._part: trio.CancelScope | None = None
        self._id = settings.id
        self.host = settings.host
        self.left = False
        """Whether this host has left the fleet. It then knows no other host."""
        self._mirror = Mirror(etcd, boottime)
        # By its value, a sign of this host differs from that of another one with its name.
        self._sign = SignOfLife(
            etcd, _ALIVE + self.host, settings.id.encode(), ttl_s=settings.ttl_s, now=boottime, lasts=lasts
        )
        self._until = until
        self._membership = Membership(
            self._gate, self._mirror, self.host, settings.id, facts=facts, load=load, take_number=take_number
        )
        self._records = Records(self._gate, self._mirror, self.host, rows)
        self.definitions = definitions(self._gate, self._mirror)
        self.peers = Peers(context, self.reach)
        self.names: Mapping[str, Names] = {
            kind: Names(
                self._gate, self._mirror, self.host, kind, there=there[kind], new_id=new_id,
                is_unsure=self._is_unsure if kind == "vms" else lambda key: False,
            )
            for kind in KINDS
        }  # fmt: skip
        """The names by kind, as in paths."""
        self._vms = vms
        self.claims = Claims(self._gate, self.host)
        self.replicas = Replicas(self._gate, self.host, self.claims)
        self.fence: Fence | None = None
        """The fence for this host's movable VMs; None if there are none."""
        self._successor: Successor | None = None
        if vms is not None:
            self.fence = Fence(self.claims, self._sign, vms, ttl_s=settings.ttl_s, now=boottime)
            self._successor = Successor(
                self.claims, self.fence, vms, host=self.host, mirror=self._mirror, slack_s=SLACK_S, now=boottime
            )

    def _is_unsure(self, vm: Key) -> bool:
        """Returns whether another host may have a VM of this host, if etcd has no data of it."""
        return vm in self._leaving() or (self._vms is not None and text_of(vm) in self._vms.held)

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Takes part in the fleet until it leaves, and then waits until cancelled. Starts at once, also without
        etcd."""
        task_status.started()
        if not self.left:
            with trio.CancelScope() as self._part:
                async with trio.open_nursery() as nursery:
                    if self.fence is not None:
                        self._sign.go_on(self._until())
                        nursery.start_soon(self.fence.keep)
                    nursery.start_soon(self._mirror.keep)
                    nursery.start_soon(self._membership.keep)
                    nursery.start_soon(self.peers.keep)
                    nursery.start_soon(self._live)
        # The supervisor restarts a child that ends.
        await trio.sleep_forever()

    async def _live(self) -> None:
        # Without a number, its VMs would have the ids of others; and a host with the name of another must not seem to
        # be that one.
        await self._membership.joined.wait()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.definitions.keep)
            # Nor without the definitions: it would know neither the projects nor the keys of the others.
            await self.definitions.joined.wait()
            nursery.start_soon(self._sign.keep)
            for names in self.names.values():
                nursery.start_soon(names.keep)
            nursery.start_soon(self._records.keep)
            if self._successor is not None:
                nursery.start_soon(self._successor.keep)

    # Reads

    def hosts(self) -> list[HostView]:
        """Returns all known hosts, by name."""
        return [self._view(name, entry) for name, entry in sorted(self._mirror.section("hosts").items())]

    def get(self, name: str) -> HostView:
        """Returns a host. :raises Problem: 404; 503, it is unknown, and etcd has not confirmed that."""
        entry = self._mirror.section("hosts").get(name)
        if entry is None and (self._mirror.trouble is not None or not self._mirror.revision):
            # As just after the start: a claim that etcd was asked for may name it.
            why = self._mirror.trouble or "etcd has not answered yet"
            raise unavailable(f"whether there is a host named {name[:80]!r} is not known: {why}")
        if entry is None:
            raise Problem(
                404, "host-not-found", f"there is no host named {name[:80]!r} in the fleet",
                field="host", hint="`volar hosts list` shows them",
            )  # fmt: skip
        return self._view(name, entry)

    def view(self) -> FleetView:
        """Returns the fleet, as seen by this host."""
        age_s = self._mirror.age_s
        obstacle = "the daemon does not use it" if self._vms is None else self._vms.obstacle
        return FleetView(
            host=self.host,
            hosts=len(self._mirror.section("hosts")),
            unreachable=tuple(host.name for host in self.hosts() if host.state == "unreachable"),
            vms=len(self._mirror.section("vms")),
            etcd="ok" if self._mirror.trouble is None and self._sign.trouble is None else "unreachable",
            age_s=None if age_s is None else round(age_s, 1),
            trouble=self._membership.trouble or self.definitions.trouble or self._sign.trouble or self._mirror.trouble,
            fence="unavailable" if obstacle else "open" if self.fence is not None and self.fence.is_open else "closed",
            fence_obstacle=obstacle,
            conflicts=tuple(name for names in self.names.values() for name in names.conflicts),
        )

    def spans(self, scope: Any) -> bool:
        """Returns whether a request covers all hosts: no other host has passed it on, it names no host, and this host
        has not left the fleet."""
        return not self.left and not is_for_one_host(scope)

    def members(self) -> list[Member]:
        """Returns all known hosts, by number. They include this one once the fleet is known."""
        found = [
            member_of(name, record, load_of(self._mirror.section("load").get(name)), is_up=self.is_up(name))
            for name, entry in self._mirror.section("hosts").items()
            if (record := record_of(entry)) is not None
        ]
        return sorted(found, key=lambda member: member.number)

    async def known_members(self) -> list[Member]:
        """Returns `members`; just after the start, waits until they are known. :raises Problem: 503, they are not known
        yet."""
        members = self.members()
        with trio.move_on_after(_FIRST_READ_S):
            while not any(member.name == self.host for member in members):
                await self._mirror.changed()
                members = self.members()
        if not any(member.name == self.host for member in members):
            raise Problem(
                503, "fleet-unavailable", "which hosts the fleet has is not known yet: etcd has not answered",
                hint=f"the header `Volant-Host: {self.host}` gives what this host has", retry_after_s=2,
            )  # fmt: skip
        return members

    async def changed(self) -> None:
        """Waits until this host's knowledge of the fleet has changed."""
        await self._mirror.changed()

    def reach(self, name: str) -> str:
        """Returns the address of a reachable host. :raises Problem: 404; 503, it is unreachable, or unknown."""
        host = self.get(name)
        if host.state == "unreachable":
            raise Problem(
                503, "host-unreachable", f"the host {name!r} gives no sign of life",
                hint="its VMs may still run; try again when it is back", retry_after_s=5,
            )  # fmt: skip
        return host.address

    def lapse(self) -> None:
        """Makes this host confirm all of its movable VMs before they continue, after an interruption."""
        self._sign.lapse()

    def is_up(self, name: str) -> bool:
        """Returns whether a host is reachable."""
        return name in self._mirror.section("alive")

    def last_known(self, vm: Key) -> VmView | None:
        """Returns the last known view of a VM whose host can't be asked; None if there is none."""
        record = self._records.get(text_of(vm))
        return None if record is None else unreachable_view(vm, record)

    def replica_of(self, vm: Key) -> ReplicaRecord | None:
        """Returns the newest known replica of a VM; None if there is none."""
        name = text_of(vm)
        claim = claim_of(self._mirror.section("vms").get(name))
        record = replica_of(self._mirror.section("replicas").get(f"vms/{name}"))
        return record if record is not None and claim is not None and record.is_of(claim) else None

    def last_known_of(self, host: str) -> list[VmView]:
        """Returns the last known VMs of a host that can't be asked."""
        return [vm for name in self.names["vms"].of(host) if (vm := self.last_known(key_of(name))) is not None]

    def labels_on(self, host: str, project: str) -> list[Mapping[str, str]]:
        """Returns the labels of the VMs in a project on a host, from its last report."""
        begin = f"{project}/"
        names = [name for name in self.names["vms"].of(host) if name.startswith(begin)]
        return [record.labels for name in names if (record := self._records.get(name)) is not None]

    def used_elsewhere(self, project: str) -> Used:
        """Returns the known use of a project on the other hosts, without disks."""
        vms = self.names["vms"].elsewhere(project)
        records = [record for vm in vms if (record := self._records.get(f"{project}/{vm}")) is not None]
        return Used(
            vms=len(vms),
            cpu_cores=sum(record.cpu_cores for record in records),
            memory_mb=sum(record.memory_mb for record in records),
            disk_mb=0,
            snapshots=len(self.names["snapshots"].elsewhere(project)),
        )

    @property
    def is_known(self) -> bool:
        """Whether etcd has been read since the start."""
        return bool(self._mirror.revision)

    @property
    def moves_since(self) -> datetime | None:
        """The time since which this host moves its VMs to others; None if it does not."""
        draining = _draining_of(self._mirror.section("draining").get(self.host))
        return None if draining is None or draining.keep_vms or self.left else draining.since

    def moves(self) -> HostMoves:
        """Returns the moves of the VMs of this host. :raises Problem: 503, it is unknown whether it is drained."""
        if not self.is_known:
            raise unavailable(
                f"whether the host is drained is not known: {self._mirror.trouble or 'etcd is not read yet'}"
            )
        return HostMoves(host=self.host, since=self.moves_since, moves=self._moves())

    # Changes

    async def drain(self, name: str, *, keep_vms: bool = False) -> HostView:
        """Gives a host no new VMs, and moves its VMs to others, unless it keeps them.

        :raises Problem: 404; 503, etcd does not answer.
        """
        self.get(name)
        before = _draining_of(self._mirror.section("draining").get(name))
        if before is None or before.keep_vms != keep_vms:
            value = _Draining(self._now() if before is None else before.since, keep_vms)
            await self._change(put(_DRAINING + name, msgspec.json.encode(value)))
        return self.get(name)

    async def undrain(self, name: str) -> HostView:
        """Gives a host new VMs again, and stops moving its VMs away. :raises Problem: 404; 503, etcd does not
        answer."""
        self.get(name)
        await self._change(delete(_DRAINING + name))
        return self.get(name)

    async def delete(self, name: str) -> None:
        """Removes a permanently lost host, and frees its names. The list of VMs that others have taken over is kept, as
        its disks may return.

        :raises Problem: 404; 409, it is reachable; 503, etcd does not answer.
        """
        tries = _DELETE_TRIES
        while True:
            if self.get(name).state == "up":
                raise Problem(
                    409, "host-is-up", f"the host {name!r} gives a sign of life, so it is not gone",
                    hint="stop its daemon first (`volar fleet leave` on that host does both)",
                )  # fmt: skip
            kind, part = self._some_of(name)
            if part:
                steps = _freeing(kind, part)
            else:
                steps = [delete(kept + name) for kept in (HOSTS, LOADS, _DRAINING, USAGE, SEEN, CHANGED)]
            # Meanwhile it may have come back, or another host have taken over its VMs.
            conditions = [absent(_ALIVE + name), *map(unchanged, part)]
            if not await self._change(*steps, conditions=conditions):
                tries -= 1
                if not tries:
                    raise unavailable("what the host has is being changed by others")
            elif not part:
                return

    def _some_of(self, host: str) -> tuple[str, list[Entry]]:
        """Returns claims of a host that one transaction can free, and their kind; empty if it has none."""
        for kind in KINDS:
            claims = self._mirror.section(kind).values()
            if own := [entry for entry in claims if (claim := claim_of(entry)) is not None and claim.owner == host]:
                return kind, own[:_AT_ONCE]
        return "", []

    async def leave(self, *, keep_vms: bool = False) -> None:
        """Removes this host and its objects from the fleet, which frees their names. Until its daemon runs without a
        fleet, it refuses changes that the fleet would have to agree on.

        :raises Problem: 409, it has VMs, and `keep_vms` is not set; 503, etcd does not answer: it stays.
        """
        if self.left:
            # The rest of an earlier, unfinished leave.
            await self._release()
            return
        has = {kind: sorted(key.name for key in there()) for kind, there in self._there.items()}
        if any(has.values()) and not keep_vms:
            named = "; ".join(f"{kind}: {first_few(names)}" for kind, names in has.items() if names)
            raise Problem(
                409, "host-has-vms", f"the fleet would not find what this host has any more ({named})",
                hint="delete it, or keep it with --keep-vms as this host's alone",
            )  # fmt: skip
        if self._leaving():
            raise Problem(409, "vms-moving", _HAS_MOVES, hint="wait until they have moved, or undrain the host first")
        if self.fence is not None and not self.fence.is_open:
            raise unavailable("this host has not heard from etcd for too long")
        try:
            await self._gate.close("this host leaves its fleet, or has left it; restart volantd to use it without one")
            await self._remove_own()
            self.left = True
        except EtcdError as error:
            raise unavailable(error) from error
        finally:
            if not self.left:
                self._gate.open()
                self._sign.doubt()
        if self._part is not None:
            self._part.cancel()
        self._mirror.clear()
        await self._release()

    async def _release(self) -> None:
        if self._vms is not None:
            await self._vms.release()

    async def _remove_own(self) -> None:
        """Deletes all data of this host from the fleet, unless another host has its name. :raises EtcdError:"""
        entry = await self._etcd.get(HOSTS + self.host)
        record = record_of(entry)
        if record is not None and record.id != self._id:
            return
        # Names first: with a sign of life that ends before, other hosts might start VMs that run here.
        for kind in KINDS:
            claims, _ = await self._etcd.list(f"{kind}/")
            own = [entry for entry in claims if (claim := claim_of(entry)) is not None and claim.owner == self.host]
            for begin in range(0, len(own), _AT_ONCE):
                part = own[begin : begin + _AT_ONCE]
                await self._remove(part, _freeing(kind, part))
        steps = [delete(section + self.host) for section in (HOSTS, LOADS, _DRAINING, _ALIVE, USAGE, SEEN, CHANGED)]
        # Objects that it creates alone are new to the fleet if it joins again.
        steps.append(delete(JOINED + self._id))
        await self._remove([] if entry is None else [entry], steps)

    async def _remove(self, known: Sequence[Entry], steps: Sequence[Step]) -> None:
        """Executes some steps, unless an entry has changed. :raises EtcdError:"""
        if not (await self._etcd.transact([unchanged(entry) for entry in known], steps)).done:
            raise EtcdUnavailable("what the fleet knows of this host has just been changed")

    async def _change(self, *steps: Step, conditions: Sequence[Compare] = ()) -> bool:
        """Executes some steps if the conditions hold, waits until this host sees the result, and returns whether they
        held."""
        try:
            done = await self._etcd.transact(conditions, steps)
        except EtcdError as error:
            raise unavailable(error) from error
        with trio.move_on_after(_SEEN_S):
            while self._mirror.revision < done.revision:
                await self._mirror.changed()
        return done.done

    def _view(self, name: str, entry: Entry) -> HostView:
        record = record_of(entry)
        load = load_of(self._mirror.section("load").get(name))
        draining = _draining_of(self._mirror.section("draining").get(name))
        alive = self._mirror.section("alive").get(name)
        facts = _UNKNOWN if record is None else record.facts
        return HostView(
            name=name,
            state="up" if alive is not None else "unreachable",
            draining_since=None if draining is None else draining.since,
            address=facts.address,
            version=facts.version,
            architecture=facts.architecture,
            accelerator=facts.accelerator,
            cpu_cores=facts.cpu_cores,
            memory_mb=facts.memory_mb,
            zone=facts.zone,
            labels=facts.labels,
            vms=load.vms,
            used_cpu_cores=load.cpu_cores,
            free_memory_mb=load.free_memory_mb,
            free_disk_mb=load.free_disk_mb,
        )


def _freeing(kind: str, claims: Sequence[Entry]) -> list[Step]:
    """Returns the steps that delete claims of one kind, with all their data."""
    steps = [delete(entry.key) for entry in claims]
    if kind == "vms":
        # Nothing else has these.
        names = [entry.key.removeprefix("vms/") for entry in claims]
        steps += [delete(f"{RECORDS}/{name}") for name in names]
        steps += [delete(f"{SPECS}vms/{name}") for name in names]
        steps += [delete(f"{REPLICAS}vms/{name}") for name in names]
    return steps


def _draining_of(entry: Entry | None) -> _Draining | None:
    """Returns the drain of a host; None if it is not drained."""
    if entry is None:
        return None
    try:
        found = msgspec.json.decode(entry.value, type=_Draining | datetime)
    except (msgspec.MsgspecError, ValueError):
        found = datetime.fromtimestamp(0, UTC)
    # Another version has written the time alone, and has moved no VM.
    return found if isinstance(found, _Draining) else _Draining(found, keep_vms=True)
