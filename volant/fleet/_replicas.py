"""The newest replica of each VM with `failover` `restore`: one key for each, next to the VM's claim, with the hosts
that have a copy.

Only the owner of a VM writes it, in a transaction that checks the claim; a host that takes the VM over checks both. So
only the newest replica of the last owner is ever used. `docs/explanation/fleet.md` has the steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime

import msgspec
import trio

from ._claims import ARRIVALS, REPLICAS, Claim, Claims, ReplicaRecord, claim_of, replica_of
from ._interface import Entry, KeyValues, OutcomeUnknown, absent, delete, put, unchanged

_PREFIX = f"{REPLICAS}vms/"
_ATTEMPTS = 5
_PAUSE_S = 0.5


class Replicas:
    """The replicas of the fleet's VMs, for one host."""

    def __init__(self, etcd: KeyValues, host: str, claims: Claims) -> None:
        self._etcd = etcd
        self._host = host
        self._claims = claims

    async def commit(self, name: str, mine: Claim, at: datetime, copies: Mapping[str, tuple[str, str]]) -> bool:
        """Commits copies as the newest replica of a VM of this host; returns whether they are.

        :param at: when they were taken
        :param copies: for each host that has received one, the id of its arrival and the name of its snapshot
        :raises EtcdError: they may be, now or later.
        """
        names = {host: snapshot for host, (_, snapshot) in copies.items()}
        wanted = ReplicaRecord(mine.vm, mine.epoch, at, names)
        value = msgspec.json.encode(wanted)
        for _ in range(_ATTEMPTS):
            claimed, before = await self._etcd.get(f"vms/{name}"), await self._etcd.get(_PREFIX + name)
            if replica_of(before) == wanted:
                return True
            claim = claim_of(claimed)
            if claimed is None or claim is None or not claim.is_of(mine) or claim.taking or claim.failover != "restore":
                return False
            arrivals: list[Entry] = []
            for host, (arrival, _) in copies.items():
                entry = await self._etcd.get(ARRIVALS + arrival)
                if entry is None or entry.value != host.encode():
                    return False
                arrivals.append(entry)
            # It names what it replaces, so that a request which comes late replaces nothing newer.
            replaces = absent(_PREFIX + name) if before is None else unchanged(before)
            conditions = [unchanged(claimed), replaces, *map(unchanged, arrivals)]
            steps = [put(_PREFIX + name, value), *(delete(entry.key) for entry in arrivals)]
            # Refused or not known: what there is now says whether it is done, or may still be.
            with suppress(OutcomeUnknown):
                if (await self._etcd.transact(conditions, steps)).done:
                    return True
            await trio.sleep(_PAUSE_S)
        raise OutcomeUnknown(f"etcd has done none of {_ATTEMPTS} requests")

    async def is_needed(self, name: str, arrival: str, snapshot: str) -> bool:
        """Returns whether a VM may continue on this host from a snapshot. If not, it never will, as the snapshot can't
        become a replica any more.

        :raises EtcdError: it is unknown.
        """
        # After this, no arrival can make it a replica. One that already has is visible in the reads below.
        await self._claims.refuse_arrival(arrival)
        record = replica_of(await self._etcd.get(_PREFIX + name))
        claim = await self._claims.get(name)
        if claim is None:
            return False
        is_given = claim.owner == self._host and claim.snapshot == snapshot
        return is_given or (record is not None and record.names(claim, self._host, snapshot))
