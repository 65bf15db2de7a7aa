"""The networks of this daemon's VMs, and the ones that VMs may have."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from functools import partial
from typing import Any

import msgspec
import trio

from actors import Child
from volant.egress import DnsSockets, HostDns, VmResolvers, dns_obstacle
from volant.host import Host
from volant.journal import Store
from volant.model import AUTO, BRIDGE, USER, default_network, first_few, kind_of, parse_subnet
from volant.network import (
    HostNetwork,
    NetworkBackend,
    NetworkKeeper,
    Networks,
    NetworkSettings,
    Passt,
    passt_obstacle,
    passt_user,
    restricted_passt_users,
)

from ._admission import Admission
from ._part_settings import nameservers_of_daemon
from ._settings import Settings, parse_uids, split

_USER_REFUSED = (
    "the daemon accepts requests from other addresses than loopback without an API key (api_allow_cidr, --insecure), "
    "and a guest with this network has an address of the host, so it could control the daemon; set an API key"
)
_logger = logging.getLogger("volant.daemon")


class GuestNetworks:
    """Keeps the networks, and decides which ones VMs may have: by the support of this host and by the access to the
    daemon. The store has the result.

    :param instance: the daemon's instance
    :param backend: changes the host's network; None for the host's own
    :param dns: the DNS servers of resolvers; None for the host's
    """

    def __init__(
        self,
        settings: Settings,
        host: Host,
        store: Store,
        admission: Admission,
        instance: str,
        backend: NetworkBackend | None,
        dns: DnsSockets | None,
    ) -> None:
        self._setting = settings.network
        self._store = store
        self._admission = admission
        users = parse_uids(settings.vm_uids)
        self.passt = Passt(host, settings.runtime_dir, instance, passt_user(users), restricted_passt_users(users))
        self.resolvers = VmResolvers(
            dns or HostDns(), tuple(split(settings.nameservers)) or nameservers_of_daemon(), self._allow_addresses
        )
        self._networks = Networks(
            backend or HostNetwork(host),
            NetworkSettings(instance=instance, subnet=parse_subnet(settings.subnet), bridge=settings.bridge),
            store.projection.rows,
            self.passt,
            self.resolvers,
        )
        self.egress = self._networks.egress
        self.keeper = Child("network", partial(NetworkKeeper, self._networks), shutdown_s=30)

    def children(self) -> list[Child[Any]]:
        return [Child("egress", self.resolvers.keep), self.keeper]

    async def _allow_addresses(self, vm_id: int, name: str, addresses: Mapping[str, float]) -> None:
        await self.egress.allow(vm_id, name, addresses)

    async def find_obstacles(self) -> None:
        """Determines which networks this host can't give to VMs. Two of the checks run a program, in parallel."""
        found = {USER: passt_obstacle()}
        unfiltered = unrestricted = None

        async def check_filter() -> None:
            nonlocal unfiltered
            unfiltered = await self._networks.passt_filter.obstacle()

        async def check_egress() -> None:
            nonlocal unrestricted
            unrestricted = dns_obstacle() or await self.egress.obstacle()

        async with trio.open_nursery() as nursery:
            if found[USER] is None:
                nursery.start_soon(check_filter)
            nursery.start_soon(check_egress)
            found[BRIDGE] = await self._networks.obstacle()
        self._store.networking = msgspec.structs.replace(
            self._store.networking,
            obstacles={kind: obstacle for kind, obstacle in found.items() if obstacle is not None},
            egress_obstacles={
                kind: obstacle
                for kind, obstacle in ((BRIDGE, unrestricted), (USER, unfiltered or unrestricted))
                if obstacle is not None
            },
            user_unfiltered=unfiltered or "",
        )

    def choose(self) -> None:
        """Decides which networks VMs may have, and their default. Repeated whenever the access to the daemon
        changes."""
        networking = self._store.networking
        refused = _USER_REFUSED if self._admission.is_open else ""
        obstacles = {**networking.obstacles, USER: refused} if refused else networking.obstacles
        default = default_network(self._setting, obstacles, is_root=os.geteuid() == 0)
        if default != networking.default and self._setting == AUTO:
            level = logging.WARNING if default.fallback else logging.INFO
            text = "the default network of VMs is %s: %s"
            _logger.log(level, text, default.network, default.reason)
        self._store.networking = msgspec.structs.replace(networking, default=default, user_refused=refused)

    def warn_of_refused(self) -> None:
        """Logs the VMs with a network that is not allowed any more. The operator decides whether they keep it."""
        refused = self._store.networking.user_refused
        behind = [row.name for row in self._store.projection.rows() if kind_of(row.network) == USER]
        if refused and behind:
            _logger.warning("these VMs have the network 'user': %s; %s", first_few(behind), refused)

    def view(self) -> dict[str, object]:
        """Returns the networks available to VMs, ready for JSON."""
        networking = self._store.networking
        obstacles = dict(networking.obstacles)
        if networking.user_refused:
            obstacles[USER] = networking.user_refused
        obstacles.setdefault(USER, networking.reason_for("available"))
        return {
            "networks": {kind: obstacles.get(kind, "available") for kind in (BRIDGE, USER)},
            "egress_rules": {kind: networking.egress_obstacles.get(kind, "available") for kind in (BRIDGE, USER)},
        }
