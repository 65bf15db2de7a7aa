"""Ownership of VMs, snapshots and volumes: one key for each, without a lease, with an epoch that only grows."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence, Set
from contextlib import suppress
from datetime import datetime
from typing import Any

import msgspec
import trio

from volant.concurrency import Backoff
from volant.model import Failover, Leaving

from ._interface import (
    Entry,
    EtcdError,
    EtcdRefused,
    EtcdUnavailable,
    KeyValues,
    OutcomeUnknown,
    Transaction,
    absent,
    delete,
    fetch,
    put,
    unchanged,
)

# The decision where a VM goes on that has been copied to another host: one transaction, which its host asks for.
#
# `docs/explanation/fleet.md` has the steps before and after it.


_RETRY_S, _RETRY_MAX_S = 0.2, 5.0
_ABSENT_TTLS = 2
"""For this number of TTLs the claim of a VM that may have been given away must be missing before its host keeps the VM:
etcd may have lost its data, and the other host may be about to claim it again."""
_logger = logging.getLogger("volant.fleet")


class Departures:
    """Transfers VMs of this host to others."""

    def __init__(self, claims: Claims, host: str, *, ttl_s: float, now: Callable[[], float]) -> None:
        self._claims = claims
        self._host = host
        self._ttl_s = ttl_s
        self._now = now

    async def conclude(self, name: str, leaving: Leaving, *, give: bool = True) -> bool:
        """Returns whether a paused VM continues on the other host, once that is certain. Otherwise it may continue
        here.

        Waits while etcd does not answer.

        :param give: whether to give it away if that has not happened yet; otherwise it then stays
        """
        mine = Claim(leaving.vm, self._host, leaving.epoch)
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S)
        absent_since: float | None = None
        while True:
            try:
                if give and await self._claims.hand_over(name, mine, leaving.id, leaving.to_host, leaving.arrival):
                    return True
                if not await self._claims.hold(name, mine):
                    return True
                if await self._claims.get(name) is not None:
                    return False
            except EtcdError as error:
                if not backoff.next_s > _RETRY_S:
                    _logger.warning("%s stays paused until etcd says whether it has moved: %s", name, error)
            else:
                absent_since = self._now() if absent_since is None else absent_since
                if self._now() - absent_since > _ABSENT_TTLS * self._ttl_s:
                    return False
            await backoff.pause()


SPECS = "specs/"
ARRIVALS = "arrivals/"
REPLICAS = "replicas/"
_ALIVE, _LOST = "alive/", "lost/"
_REFUSED, _REFUSED_S = b"", 3600
"""The value of a refused arrival, and the seconds after which no late request for it can arrive."""
_AT_ONCE = 100
"""Claims read in one transaction: etcd allows 128 steps."""
_PAUSE_S = 0.5
_ATTEMPTS = 20


class Claim(msgspec.Struct, frozen=True):
    """The ownership of a VM, or of another object that only one host has."""

    vm: str
    """The VM's id. A new VM with the same name has another one."""
    owner: str
    """The owning host."""
    epoch: int
    """The number of owners so far. Each host refuses requests with an earlier epoch."""
    failover: Failover = "never"
    before: str = ""
    """The previous owner; empty for the first one."""
    taking: bool = False
    """Whether the owner has taken it over and not started it yet. Otherwise, an owner without such a VM has deleted
    it."""
    offered: bool = False
    """Whether any host may take it over, as the owner can't start it."""
    snapshot: str = ""
    """While `taking`: the owner's snapshot from which the moved or restored VM continues; empty if it boots."""

    def is_of(self, other: Claim) -> bool:
        """Returns whether both belong to the same owner of the same VM."""
        return (self.vm, self.owner, self.epoch) == (other.vm, other.owner, other.epoch)


class ReplicaRecord(msgspec.Struct, frozen=True):
    """The newest replica of a VM."""

    vm: str
    """The id of the VM in its claim; `epoch` likewise."""
    epoch: int
    at: datetime
    """When it was taken."""
    copies: Mapping[str, str]
    """The snapshots from which the VM can continue, by the hosts that have them."""

    def is_of(self, claim: Claim) -> bool:
        """Returns whether the VM has not continued from a newer state, or on another host."""
        return (self.vm, self.epoch) == (claim.vm, claim.epoch)

    def names(self, claim: Claim, host: str, snapshot: str) -> bool:
        """Returns whether a VM with that claim may continue from a snapshot of a host."""
        return self.is_of(claim) and self.copies.get(host) == snapshot


class NameTaken(Exception):
    """The name is in use in the fleet."""


class Claims:
    """The claims of a fleet on names of one kind, for one host.

    After an unknown outcome each method reads the claim, which names its owner. So it returns a certain answer, or
    raises `EtcdError` after some attempts.

    :param kind: the name in paths, such as `vms`
    """

    def __init__(self, etcd: KeyValues, host: str, kind: str = "vms") -> None:
        self._etcd = etcd
        self._host = host
        self._prefix = f"{kind}/"
        self._specs = f"{SPECS}{kind}/"
        self._replicas = f"{REPLICAS}{kind}/"

    async def get(self, name: str) -> Claim | None:
        """Returns the claim of a name, as etcd has it now. :raises EtcdError:"""
        return claim_of(await self._etcd.get(self._prefix + name))

    async def create(
        self,
        name: str,
        vm: str,
        failover: Failover = "never",
        spec: bytes = b"",
        *,
        is_there: Callable[[], bool] = lambda: False,
    ) -> Claim:
        """Claims a name for a new VM. If this host already has the claim, for a VM that was deleted or never created,
        the claim is renewed, unless the host is taking the VM over.

        :param name: project and name; `vm` is a new id
        :param spec: the data that another host needs to start it
        :param is_there: returns whether this host has a VM of that name, which may have just arrived from another host
        :raises NameTaken: :raises EtcdError: nothing is claimed, or the same call finds the claim
        """
        claim = Claim(vm, self._host, 1, failover)
        key = self._prefix + name
        conditions = [absent(key)]
        steps = [put(key, msgspec.json.encode(claim)), delete(self._replicas + name)]
        steps.append(put(self._specs + name, spec) if spec else delete(self._specs + name))
        for _ in range(2):

            async def ask() -> Transaction:
                return await self._etcd.transact(conditions, steps)  # noqa: B023

            if await self._certain(ask, key, claim):
                return claim
            entry = await self._etcd.get(key)
            found = claim_of(entry)
            if found is not None and found.vm == vm and found.owner == self._host:
                return found
            if entry is None or found is None or found.owner != self._host or found.taking or is_there():
                break
            conditions = [unchanged(entry)]
        raise NameTaken(name)

    async def release(self, name: str, claim: Claim) -> None:
        """Frees the name of a deleted VM. The claim of another owner is left alone. :raises EtcdError:"""
        entry = await self._etcd.get(self._prefix + name)
        if entry is not None and claim_of(entry) == claim:
            await self._etcd.transact(
                [unchanged(entry)], [delete(key + name) for key in (self._prefix, self._specs, self._replicas)]
            )

    async def free(self, name: str) -> None:
        """Frees a name if this host has it, and is not taking the VM over. :raises EtcdError:"""
        claim = await self.get(name)
        if claim is not None and claim.owner == self._host and not claim.taking:
            await self.release(name, claim)

    async def withdraw(self, name: str, claim: Claim) -> None:
        """Prevents other hosts from starting a VM that is about to be deleted, even if this host fails.

        :raises EtcdError: others may still start it. :raises NameTaken: another host has it.
        """
        await self._amend(name, claim, failover="never", taking=False)

    async def settle(self, name: str, claim: Claim) -> None:
        """Records that a VM that was taken over is on this host. :raises EtcdError: :raises NameTaken: another host has
        it."""
        await self._amend(name, claim, taking=False, snapshot="")

    async def _amend(self, name: str, claim: Claim, **changes: Any) -> None:
        """Changes a claim of this host, which keeps it."""
        entry = await self._etcd.get(self._prefix + name)
        found = claim_of(entry)
        if entry is None or found is None or not found.is_of(claim):
            raise NameTaken(name)
        wanted = msgspec.structs.replace(found, **changes)

        async def ask() -> Transaction:
            return await self._etcd.transact([unchanged(entry)], [put(entry.key, msgspec.json.encode(wanted))])

        if found != wanted and not await self._certain(ask, entry.key, wanted):
            raise NameTaken(name)

    async def offer(self, name: str, claim: Claim) -> None:
        """Allows any host to take over a VM that this host has taken over and can't start.

        :raises EtcdError: :raises NameTaken: another host has it.
        """
        await self._amend(name, claim, offered=True)

    async def spec(self, name: str) -> bytes:
        """Returns the data for starting a VM; empty if there is none. :raises EtcdError:"""
        entry = await self._etcd.get(self._specs + name)
        return b"" if entry is None else entry.value

    async def all_of(self, names: Sequence[str]) -> dict[str, Claim | None]:
        """Returns the present claims of many names; None for a name without a claim.

        :raises EtcdError: it does not answer, or a claim is malformed
        """
        found: dict[str, Claim | None] = {}
        for begin in range(0, len(names), _AT_ONCE):
            part = names[begin : begin + _AT_ONCE]
            done = await self._etcd.transact([], [fetch(self._prefix + name) for name in part])
            for name, entry in zip(part, done.reads, strict=True):
                found[name] = claim_of(entry)
                if entry is not None and found[name] is None:
                    raise EtcdRefused(f"the claim of {name} is malformed")
        return found

    async def lost(self) -> Set[str]:
        """Returns the ids of the VMs that others have taken over from this host. :raises EtcdError:"""
        prefix = f"{_LOST}{self._host}/"
        entries, _ = await self._etcd.list(prefix)
        return {entry.key.removeprefix(prefix) for entry in entries}

    async def forget_lost(self, vm: str) -> None:
        """Records that this host has removed everything of a VM that another host has taken over. :raises EtcdError:"""
        await self._etcd.transact([], [delete(f"{_LOST}{self._host}/{vm}")])

    async def reclaim(self, name: str, claim: Claim, spec: bytes) -> None:
        """Claims the name of a VM of this host again, after etcd has lost its claim. A claim of this host for another
        VM is replaced; it was made when no claim was found.

        :raises NameTaken: another host has the name, or has taken the VM over. :raises EtcdError:
        """
        key = self._prefix + name
        wanted = msgspec.structs.replace(claim, taking=False)
        steps = [put(key, msgspec.json.encode(wanted))]
        steps.append(put(self._specs + name, spec) if spec else delete(self._specs + name))
        not_lost = absent(f"{_LOST}{self._host}/{claim.vm}")
        conditions = [absent(key), not_lost]
        for _ in range(2):

            async def ask() -> Transaction:
                return await self._etcd.transact(conditions, steps)  # noqa: B023

            if await self._certain(ask, key, wanted):
                return
            entry = await self._etcd.get(key)
            found = claim_of(entry)
            if entry is None or found is None or found.owner != self._host or found.taking or found.vm == claim.vm:
                break
            conditions = [unchanged(entry), not_lost]
        raise NameTaken(name)

    async def take_over(self, name: str, dead: Claim) -> Claim | None:
        """Makes this host the owner of a VM of an unreachable host. Returns None if the host is reachable, another host
        was faster, or the VM needs its newest replica and this host does not have it. Wait for the slack before. The
        other host finds the loss in `lost`, whatever happens to the claim until then. :raises EtcdError:
        """
        entry = await self._etcd.get(self._prefix + name)
        if entry is None or claim_of(entry) != dead:
            return None
        copied = record = snapshot = None
        if dead.failover == "restore":
            copied = await self._etcd.get(self._replicas + name)
            record = replica_of(copied)
            snapshot = None if record is None or not record.is_of(dead) else record.copies.get(self._host)
            if copied is None or record is None or snapshot is None:
                return None
        claim = msgspec.structs.replace(
            dead,
            owner=self._host,
            epoch=dead.epoch + 1,
            # The host that offers it has never run it.
            before=dead.before if dead.offered else dead.owner,
            taking=True,
            offered=False,
            # Its former snapshot is on another host.
            snapshot=snapshot or "",
        )
        conditions = [unchanged(entry)]
        if not dead.offered:
            conditions.append(absent(_ALIVE + dead.owner))
        steps = [
            put(entry.key, msgspec.json.encode(claim)),
            # It may have lost it once, and have it again.
            delete(f"{_LOST}{self._host}/{dead.vm}"),
        ]
        if copied is not None and record is not None:
            # It stays the newest one until the VM has run and is copied again: the other copies are as good.
            conditions.append(unchanged(copied))
            steps.append(put(copied.key, msgspec.json.encode(msgspec.structs.replace(record, epoch=claim.epoch))))
        # A host may take over what it has offered itself, and etcd takes no key twice in a transaction.
        if dead.owner != self._host:
            steps.append(put(f"{_LOST}{dead.owner}/{dead.vm}", name.encode()))

        async def ask() -> Transaction:
            return await self._etcd.transact(conditions, steps)

        return claim if await self._certain(ask, entry.key, claim) else None

    # Moves

    async def note_arrival(self, move: str) -> None:
        """Records that this host has received a moving VM completely, so that it may become the owner. :raises
        EtcdError:"""
        key = ARRIVALS + move
        if await self._etcd.get(key) is None:
            await self._etcd.transact([absent(key)], [put(key, self._host.encode())])

    async def refuse_arrival(self, move: str) -> None:
        """Ensures that this host does not become the owner of a moving VM any more, unless it already has.

        :raises EtcdError: it still may.
        """
        key = ARRIVALS + move
        entry = await self._etcd.get(key)
        if entry is not None and entry.value == _REFUSED:
            return
        # A key that is only deleted could be written again by a request that comes late.
        lease = await self._etcd.grant(_REFUSED_S)
        condition = absent(key) if entry is None else unchanged(entry)
        if not (await self._etcd.transact([condition], [put(key, _REFUSED, lease=lease.id)])).done:
            raise EtcdUnavailable("the arrival has just been changed")

    async def hand_over(self, name: str, mine: Claim, move: str, to: str, snapshot: str) -> bool:
        """Gives a stopped VM of this host to a host that has received it completely. Returns whether it was given.

        A request of this host may still take effect later, until `hold`. A claim of another host also counts as given.

        :param move: the id of its move; `snapshot` is the one from which the other host starts it
        :raises EtcdError: it may be given, now or later.
        """
        key = self._prefix + name
        entry, arrival = await self._etcd.get(key), await self._etcd.get(ARRIVALS + move)
        alive = await self._etcd.get(_ALIVE + to)
        found = claim_of(entry)
        if entry is None or found is None or not found.is_of(mine):
            return found is not None and _is_given(found, mine)
        if arrival is None or arrival.value != to.encode() or alive is None:
            return False
        claim = msgspec.structs.replace(
            found, owner=to, epoch=found.epoch + 1, before=self._host, taking=True, offered=False, snapshot=snapshot
        )
        steps = [
            put(key, msgspec.json.encode(claim)),
            # It goes on from something newer.
            delete(self._replicas + name),
            delete(arrival.key),
            delete(f"{_LOST}{to}/{found.vm}"),
            put(f"{_LOST}{self._host}/{found.vm}", name.encode()),
        ]
        conditions = [unchanged(entry), unchanged(arrival), unchanged(alive)]

        async def ask() -> Transaction:
            return await self._etcd.transact(conditions, steps)

        return await self._certain(ask, key, claim)

    async def hold(self, name: str, mine: Claim) -> bool:
        """Ensures that no earlier request gives a VM of this host away any more. Returns whether it still belongs to
        this host. :raises EtcdError: it is unknown."""
        for _ in range(_ATTEMPTS):
            entry = await self._etcd.get(self._prefix + name)
            found = claim_of(entry)
            if entry is None or found is None or not found.is_of(mine):
                return not await self.is_given(name, mine)
            with suppress(OutcomeUnknown):
                # The same value, at another revision: what names the one before is refused.
                if (await self._etcd.transact([unchanged(entry)], [put(entry.key, entry.value)])).done:
                    return True
            await trio.sleep(_PAUSE_S)
        raise OutcomeUnknown(f"etcd has answered none of {_ATTEMPTS} requests")

    async def end_move(self, vm: str, move: str, *, left: bool) -> None:
        """Removes the data of a move from this host.

        :param left: whether the VM has left and was removed here. A VM that stays may have been taken over or even
            deleted in the meantime, which nothing else records
        :raises EtcdError:
        """
        steps = [delete(ARRIVALS + move)]
        if left:
            steps.append(delete(f"{_LOST}{self._host}/{vm}"))
        await self._etcd.transact([], steps)

    async def is_given(self, name: str, mine: Claim) -> bool:
        """Returns whether another host was given a VM of this host, or has taken it over. :raises EtcdError:"""
        found = await self.get(name)
        if found is not None and _is_given(found, mine):
            return True
        is_own = found is not None and found.is_of(mine)
        return not is_own and await self._etcd.get(f"{_LOST}{self._host}/{mine.vm}") is not None

    async def _certain(self, ask: Callable[[], Awaitable[Transaction]], key: str, claim: Claim) -> bool:
        """Returns whether a change was made. After an unknown outcome, the key decides; otherwise the change is
        requested again, which its conditions make safe."""
        for _ in range(_ATTEMPTS):
            try:
                if (await ask()).done:
                    return True
            except OutcomeUnknown:
                await trio.sleep(_PAUSE_S)
                if claim_of(await self._etcd.get(key)) == claim:
                    return True
                continue
            # It may have been done by an earlier attempt that came late.
            return claim_of(await self._etcd.get(key)) == claim
        raise OutcomeUnknown(f"etcd has answered none of {_ATTEMPTS} requests")


def _is_given(found: Claim, mine: Claim) -> bool:
    """Returns whether a claim shows that another host has a VM of this host, or a VM with the same name."""
    return found.owner != mine.owner or (found.vm == mine.vm and found.epoch > mine.epoch)


def claim_of(entry: Entry | None) -> Claim | None:
    """Returns the claim in a key; None if there is none, or it is malformed."""
    if entry is None:
        return None
    try:
        return msgspec.json.decode(entry.value, type=Claim)
    except (msgspec.MsgspecError, ValueError):
        return None


def replica_of(entry: Entry | None) -> ReplicaRecord | None:
    """Returns the newest replica in a key; None if there is none, or it is malformed."""
    if entry is None:
        return None
    try:
        return msgspec.json.decode(entry.value, type=ReplicaRecord)
    except (msgspec.MsgspecError, ValueError):
        return None
