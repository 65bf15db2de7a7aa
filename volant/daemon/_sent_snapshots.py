"""Removes the snapshots of moves and replicas once no VM continues from them any more."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from volant.fleet import EtcdError, Fleet, text_of
from volant.journal import Store
from volant.model import Problem, Snapshot
from volant.vm import Vms

from ._arrivals import Arrivals

_LOOK_S = 2.0
_logger = logging.getLogger("volant.fleet")


class SentSnapshots:
    """The snapshots of moves and replicas on this host, at either end.

    :param is_sent: returns whether this host is sending the replica with that id
    :param fleet, vms: return parts of the daemon that are created later
    """

    def __init__(
        self,
        store: Store,
        arrivals: Arrivals,
        host_name: str,
        *,
        is_sent: Callable[[str], bool],
        fleet: Callable[[], Fleet],
        vms: Callable[[], Vms],
    ) -> None:
        self._store = store
        self._arrivals = arrivals
        self._name = host_name
        self._is_sent = is_sent
        self._fleet = fleet
        self._vms = vms

    async def keep(self) -> None:
        """Removes unused snapshots until cancelled."""
        while True:
            await trio.sleep(_LOOK_S)
            for snapshot in list(self._store.projection.snapshots.values()):
                if not snapshot.move or snapshot.status != "ready":
                    continue
                try:
                    if not await self._is_used(snapshot):
                        await self._vms().copies.remove_snapshot(snapshot.key, move=snapshot.move)
                except (Problem, EtcdError) as error:
                    _logger.debug("the snapshot %s of a move or a replica stays for now: %s", snapshot.name, error)

    async def _is_used(self, snapshot: Snapshot) -> bool:
        """Returns whether a snapshot is being sent from or to this host, or a VM may still continue from it here.

        :raises EtcdError:
        """
        projection, leaving = self._store.projection, snapshot.vm.leaving
        if leaving is None or leaving.from_host == self._name:
            if snapshot.is_replica:
                return self._is_sent(snapshot.move)
            row = projection.by_id(snapshot.vm.id)
            return row is not None and row.leaving is not None and row.leaving.id == snapshot.move
        row = projection.get(snapshot.vm.key)
        if row is not None and row.arrived == snapshot.move:
            # Its first boot is to come, or may have failed and may be tried again.
            return row.checkpoint is not None or row.disk_from is not None
        if self._fleet().left:
            return False
        if self._arrivals.has(snapshot.move):
            return True
        name = text_of(snapshot.vm.key)
        if snapshot.is_replica:
            newest = self._fleet().replica_of(snapshot.vm.key)
            if newest is not None and newest.copies.get(self._name) == snapshot.name:
                return True
            return await self._fleet().replicas.is_needed(name, snapshot.move, snapshot.name)
        claims = self._fleet().claims
        # Whoever could still give it to this host has done so before the claim is read.
        await claims.refuse_arrival(snapshot.move)
        claim = await claims.get(name)
        return claim is not None and claim.owner == self._name and claim.snapshot == snapshot.name
