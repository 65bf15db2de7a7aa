"""What a guest with a network interface knows of its network: its own addresses, and its peers by name."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from volant.journal import Projection
from volant.model import VmRow, is_named


class Peers(msgspec.Struct):
    """The peers of one VM, as the rows have them now."""

    projection: Projection
    row: VmRow
    nameservers: tuple[str, ...]

    @property
    def can_change(self) -> bool:
        """Whether the VM's network has a name, and so may have other members."""
        return is_named(self.row.network)

    def hosts(self) -> Mapping[str, str]:
        """Returns the addresses of the network's members by name, the VM among them; empty without a named network."""
        return self.projection.members(self.row.network_key) if self.can_change else {}

    async def changed(self, hosts: Mapping[str, str]) -> None:
        """Returns once the members are others than `hosts`."""
        await self.projection.members_are_not(self.row.network_key, hosts)

    def interface(self) -> dict[str, object] | None:
        """Returns what a clone configures its network interface with (`GuestNetwork`); None: it has none."""
        lease = self.row.lease
        if lease is None:
            return None
        found: dict[str, object] = {
            "mac": lease.mac,
            "address": lease.address,
            "prefix": lease.prefix,
            "gateway": lease.gateway,
        }
        if self.nameservers:
            found["nameservers"] = list(self.nameservers)
        return found | {"hosts": dict(self.hosts())}
