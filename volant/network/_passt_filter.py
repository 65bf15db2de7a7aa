"""Which destinations a guest behind passt reaches: the world, as a user of the host does, and nothing of the host.

What passt sends for its guests are packets of the host's own, so they are known by the user that it runs as. That is
one for all passts of a daemon, and no hypervisor's. A table of its own refuses what goes to the host's own addresses,
to broadcast and multicast, to clouds' metadata and to guests on the bridge. That is decided before destinations are
translated, as for guests on the bridge. Answers pass: who uses a published port gets them.

The table is there before the first passt is started, and put back when somebody takes it away. Two daemons may have the
same user for it, and a table each: what either refuses, both do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import trio

from volant.model import USER, Phase, VmRow, kind_of

from ._backend import NetworkBackend, NetworkFailed
from ._passt import Passt
from ._plan import NetworkSettings
from ._rules import AZURE, METADATA, nothing

_UID_MAP = Path("/proc/self/uid_map")


def passt_user(users: range) -> int | None:
    """The user that passt runs as, of those for hypervisors alone: the last, which no hypervisor is given. None: we are
    not root, and it runs as we do."""
    return users[-1] if os.geteuid() == 0 and _is_known(users[-1]) else None


def _is_known(user: int) -> bool:
    """Whether this user namespace has such a user. In a container root may have few."""
    try:
        ranges = [tuple(map(int, line.split())) for line in _UID_MAP.read_text().splitlines()]
    except OSError:
        return True
    return any(first <= user < first + count for first, _, count in ranges)


def passt_rules(settings: NetworkSettings, user: int) -> str:
    """What makes the table, whatever it is now."""
    return f"""{nothing((settings.passt_table,))}table {settings.passt_table} {{
    chain output {{
        type filter hook output priority mangle; policy accept;
        meta skuid {user} goto from-passt
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
    """The table of one daemon."""

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
        self._obstacle: str | None = "it is not known yet"
        self._turn = trio.Lock()
        self.stands = False
        """Whether the table is there, as far as we know."""

    async def obstacle(self) -> str | None:
        """Why there can be none here; None: nothing is in the way. Where something is, passt runs without."""
        self._obstacle = await self._find_obstacle()
        return self._obstacle

    async def _find_obstacle(self) -> str | None:
        if self._user is None:
            return "volantd does not run as root" if os.geteuid() else "volantd has no user for passt (vm_uids)"
        try:
            await self._backend.check(passt_rules(self._settings, self._user))
        except NetworkFailed as error:
            return str(error)
        return None

    async def ensure(self) -> None:
        """Have it there, where there can be one. :raises NetworkFailed: it can't be loaded."""
        async with self._turn:
            if self._user is not None and self.is_possible and not self.stands:
                await self._backend.load(passt_rules(self._settings, self._user))
                self.stands = True

    @property
    def is_possible(self) -> bool:
        """Whether there can be one, as `obstacle` has found."""
        return self._obstacle is None

    def forget(self) -> None:
        """Somebody may have taken it away."""
        self.stands = False

    async def remove_unused(self) -> None:
        """Take it away, unless a passt needs it. :raises NetworkFailed: it is left."""
        began = self.stands or any(kind_of(row.network) == USER for row in self._rows())
        if self.is_possible and began and not await self.is_needed():
            self.stands = False
            await self._backend.load(nothing((self._settings.passt_table,)))

    async def is_needed(self) -> bool:
        """Whether there is a passt that it is for, or is about to be."""
        # One that no row knows may be a VM's that is found again.
        return any(map(_has_passt, self._rows())) or (self._passt is not None and await self._passt.any_runs())


def _has_passt(row: VmRow) -> bool:
    """Whether a passt speaks for a VM's guest, or is about to."""
    return kind_of(row.network) == USER and bool(row.tag) and row.phase not in (Phase.KILL, Phase.REMOVE)
