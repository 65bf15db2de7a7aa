"""Filters the destinations of guests behind passt: they reach the internet but not the host.

passt's packets are the host's own, so the rules match the user of passt. All passts of a daemon run as one user, which
no hypervisor has, except those of VMs with an egress policy: each of these has its own user, whose destinations
`_egress.py` restricts further. A table rejects packets to the host's own addresses, to broadcast and multicast, to
cloud metadata services and to guests on the bridge, before destination NAT. Answers pass, so published ports work.

The table is loaded before the first passt starts, and again when it is removed. Two daemons with the same user have a
table each, and both tables apply to both.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import trio

from volant.host import user_of_passt, users_of_restricted_passt
from volant.model import USER, VmRow, kind_of
from volant.model.addresses import AZURE, METADATA

from ._backend import NetworkBackend, NetworkFailed
from ._passt import Passt, has_passt
from ._plan import NetworkSettings
from ._rules import delete_tables

_UID_MAP = Path("/proc/self/uid_map")


def passt_user(users: range) -> int | None:
    """Returns the user for passt: the last of `users`, which no hypervisor has. None if the daemon is not root or the
    user does not exist here."""
    user = user_of_passt(users)
    return user if os.geteuid() == 0 and _is_known(user) else None


def _is_known(user: int) -> bool:
    """Returns whether this user namespace has such a user. In a container root may have few."""
    try:
        ranges = [tuple(map(int, line.split())) for line in _UID_MAP.read_text().splitlines()]
    except OSError:
        return True
    return any(first <= user < first + count for first, _, count in ranges)


def restricted_passt_users(users: range) -> range:
    """Returns the users for passts of VMs with an egress policy; empty if the daemon is not root or a user does not
    exist here."""
    found = users_of_restricted_passt(users)
    return found if os.geteuid() == 0 and found and _is_known(found[0]) and _is_known(found[-1]) else range(0)


def passt_rules(settings: NetworkSettings, user: int, users: range = range(0)) -> str:
    """Returns the rules that create or replace the table. `users` are those of passts of VMs with an egress policy."""
    skuids = f"{{ {user}, {users[0]}-{users[-1]} }}" if users else str(user)
    return f"""{delete_tables((settings.passt_table,))}table {settings.passt_table} {{
    chain output {{
        type filter hook output priority mangle; policy accept;
        meta skuid {skuids} goto from-passt
    }}
    chain from-passt {{
        ct state established,related accept
        meta nfproto != ipv4 reject with icmpx admin-prohibited
        fib daddr type {{ local, broadcast, multicast }} reject with icmpx admin-prohibited
        oifname "{settings.bridge_name}" reject with icmpx admin-prohibited
        ip daddr {AZURE} meta l4proto {{ tcp, udp }} th dport 53 accept
        ip daddr {{ {", ".join(METADATA)} }} reject with icmpx admin-prohibited
    }}
}}
"""


class PasstFilter:
    """Manages the table of one daemon."""

    def __init__(
        self,
        backend: NetworkBackend,
        settings: NetworkSettings,
        rows: Callable[[], Iterable[VmRow]],
        passt: Passt | None,
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._rows = rows
        self._passt = passt
        self._user = passt.user if passt is not None else None
        self._users = passt.users if passt is not None else range(0)
        self._obstacle: str | None = "it was not checked yet"
        self._loading = trio.Lock()
        self.is_loaded = False
        """Whether the table was loaded and no removal was noticed."""

    async def obstacle(self) -> str | None:
        """Returns why this host can't filter, or None. passt then runs unfiltered."""
        self._obstacle = await self._find_obstacle()
        return self._obstacle

    async def _find_obstacle(self) -> str | None:
        if self._user is None:
            return "volantd does not run as root" if os.geteuid() else "volantd has no user for passt (vm_uids)"
        try:
            await self._backend.check(passt_rules(self._settings, self._user, self._users))
        except NetworkFailed as error:
            return str(error)
        return None

    async def ensure(self) -> None:
        """Loads the table if the host can filter. :raises NetworkFailed: when it can't be loaded."""
        async with self._loading:
            if self._user is not None and self.is_possible and not self.is_loaded:
                await self._backend.load(passt_rules(self._settings, self._user, self._users))
                self.is_loaded = True

    @property
    def is_possible(self) -> bool:
        """Whether the host can filter, as `obstacle` found."""
        return self._obstacle is None

    def forget(self) -> None:
        """Records that the table may have been removed."""
        self.is_loaded = False

    async def remove_unused(self) -> None:
        """Removes the table unless a passt needs it. :raises NetworkFailed: when it can't be removed."""
        began = self.is_loaded or any(kind_of(row.network) == USER for row in self._rows())
        if self.is_possible and began and not await self.is_needed():
            self.is_loaded = False
            await self._backend.load(delete_tables((self._settings.passt_table,)))

    async def is_needed(self) -> bool:
        """Returns whether a passt runs or is about to start."""
        # A passt without a row may belong to a VM that is to be adopted.
        return any(map(has_passt, self._rows())) or (self._passt is not None and await self._passt.any_runs())
