"""Keeps the firewall of VMs with an egress policy: their rules, the addresses of their names, and counts of denials.

The table is loaded before a VM can send its first packet, and again when it was removed. It outlives the daemon, so the
VMs of a killed daemon stay restricted. A new daemon reads allowed addresses and counters from the kernel, then replaces
the table in one transaction, as its resolvers have other ports.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from ipaddress import IPv4Network
from typing import Any, Protocol

import msgspec
import trio

from volant.model import VmRow, is_named, is_restricted

from ._backend import NetworkBackend, NetworkFailed
from ._egress_rules import (
    Addresses,
    EgressGuest,
    EgressState,
    added,
    allowed,
    counter_name,
    denied_set,
    egress_ruleset,
    removed,
    sets_of,
)
from ._passt import Passt, has_passt
from ._plan import NetworkSettings, needs_tap
from ._rules import delete_tables

MAX_ADDRESSES = 1024
"""Maximum addresses that are allowed at a time for the names of one VM whose rules have the same protocol and ports."""
_SLACK_S = 1.0
"""An address that is allowed for only this much less than requested is not allowed again."""
_logger = logging.getLogger("volant.network")


class Resolvers(Protocol):
    """The daemon's DNS servers, one for each VM with an egress policy."""

    async def open(self, guest: EgressGuest) -> int:
        """Starts a VM's resolver unless it runs, and returns its port. :raises NetworkFailed: when it can't listen."""
        ...

    def close(self, vm_id: int) -> None:
        """Stops a VM's resolver, if there is one."""
        ...


class DeniedDestination(msgspec.Struct, frozen=True):
    """A destination that a VM was denied."""

    address: str
    port: int
    protocol: str
    ago_s: float
    """Seconds since the last attempt."""


class EgressFilter:
    """Manages the table of one daemon."""

    def __init__(
        self,
        backend: NetworkBackend,
        settings: NetworkSettings,
        rows: Callable[[], Iterable[VmRow]],
        passt: Passt | None,
        resolvers: Resolvers | None,
    ) -> None:
        """Creates it. `resolvers` is None if no VM has an egress policy."""
        self._backend = backend
        self._settings = settings
        self._rows = rows
        self._passt = passt
        self._resolvers = resolvers
        self._loaded: dict[int, tuple[EgressGuest, int]] | None = None
        """The VMs in the table, with the ports of their resolvers; None if unknown."""
        self._with_user: set[int] = set()
        """The VMs with their own user of passt, even while the content of the table is unknown."""
        self._deadlines: dict[int, dict[str, dict[str, float]]] = {}
        """When the permission of addresses ends, by VM and set."""
        self._listening: set[int] = set()
        self._has_table = False
        """Whether the table may exist."""
        self._was_read = False
        """Whether the table of an earlier daemon was read."""
        self._changing = trio.Lock()
        self._waiting: list[_Request] = []

    async def obstacle(self) -> str | None:
        """Returns why this host can't filter, or None. Changes nothing."""
        guests = [
            EgressGuest(vm_id=1, egress="none", gateway="192.0.2.1", address="192.0.2.2", subnet="192.0.2.0/24"),
            EgressGuest(vm_id=2, egress="none", gateway="192.0.2.1", user=65536),
        ]
        try:
            await self._backend.check(
                egress_ruleset(self._settings, [(each, EgressState(port=53)) for each in guests], range(1, 9))
            )
        except NetworkFailed as error:
            return str(error)
        return None

    async def ensure(self, *, detached: Collection[int] = ()) -> Mapping[int, NetworkFailed]:
        """Makes the table match the rows. Returns the VMs that have no resolver.

        A VM that is being killed keeps its rules, as its processes may still run.

        :param detached: VMs that can't send any more, so they lose their rules
        :raises NetworkFailed: when the table can't be loaded.
        """
        async with self._changing:
            wanted = {guest.vm_id: guest for guest in self._plan(detached)}
            if self._loaded is None:
                return await self._replace(wanted)
            return await self._update(wanted)

    async def allow(self, vm_id: int, name: str, addresses: Mapping[str, float]) -> None:
        """Lets a VM connect to the addresses of a DNS name, by the rules for that name. Returns when the kernel allows
        it.

        :param addresses: each with the seconds for which it is allowed
        :raises NetworkFailed: when they can't be allowed.
        """
        request = _Request(vm_id, name, addresses)
        self._waiting.append(request)
        # The task that gets the lock serves all that wait for it, so many answers need one run of nft.
        async with self._changing:
            if not request.is_served:
                requests, self._waiting = self._waiting, []
                try:
                    await self._allow(requests)
                finally:
                    # If this task is cancelled, the next one serves the others.
                    self._waiting += [each for each in requests if not each.is_served and each is not request]
        if request.failure is not None:
            raise request.failure

    def forget(self) -> None:
        """Records that the table may have been removed."""
        self._loaded = None

    async def remove_unused(self) -> None:
        """Removes the table unless a VM needs it. :raises NetworkFailed: when it can't be removed."""
        async with self._changing:
            if self._has_table and not any(map(_needs_rules, self._rows())):
                self._loaded = None
                await self._backend.load(delete_tables((self._settings.egress_table,)))
                self._has_table = False

    async def denied_connections(self) -> Mapping[int, int]:
        """Returns the number of denied packets that begin a connection, by VM. :raises NetworkFailed:"""
        if not self._loaded:
            return {}
        listed = await self._backend.listed(f"counters table {self._settings.egress_table}")
        counters = _counters(listed)
        return {vm_id: counters.get(counter_name(vm_id), (0, 0))[0] for vm_id in self._loaded or ()}

    async def denied_destinations(self, vm_id: int) -> list[DeniedDestination]:
        """Returns a VM's recently denied destinations, newest first. :raises NetworkFailed:"""
        if not self._loaded or vm_id not in self._loaded:
            return []
        found = []
        for entry in await self._backend.listed(f"set {self._settings.egress_table} {denied_set(vm_id)}"):
            held = entry.get("set", {})
            for value, left_s in _elements_of(held):
                if isinstance(value, dict) and len(parts := value.get("concat", ())) == 3:
                    ago_s = float(held.get("timeout", 0)) - left_s
                    found.append(DeniedDestination(str(parts[0]), int(parts[2]), str(parts[1]), max(0.0, ago_s)))
        return sorted(found, key=lambda each: each.ago_s)

    def _plan(self, detached: Collection[int]) -> list[EgressGuest]:
        guests: list[EgressGuest] = []
        # If two VMs would have the same user of passt, the one that has it keeps it; see `check_user`.
        for row in sorted(self._rows(), key=lambda row: (row.id not in self._with_user, row.id)):
            lease = row.lease
            if not is_restricted(row.egress) or lease is None:
                continue
            if not (needs_tap(row) or has_passt(row) or (row.id not in detached and self._may_still_send(row))):
                continue
            if lease.tap:
                subnet = str(IPv4Network(f"{lease.address}/{lease.prefix}", strict=False))
                guests.append(
                    EgressGuest(
                        vm_id=row.id,
                        egress=row.egress,
                        gateway=lease.gateway,
                        address=lease.address,
                        subnet=subnet if is_named(row.network) else "",
                    )
                )
            elif self._passt is not None:
                user = self._passt.user_of(row)
                if user is not None and all(guest.user != user for guest in guests):
                    guests.append(EgressGuest(vm_id=row.id, egress=row.egress, gateway=lease.gateway, user=user))
        return guests

    def _may_still_send(self, row: VmRow) -> bool:
        """Returns whether processes of a VM that is being killed may still send."""
        return bool(row.tag) and (self._loaded is None or row.id in self._loaded)

    @property
    def is_loaded(self) -> bool:
        """Whether the table exists, as last known."""
        return self._has_table

    def has(self, vm_id: int) -> bool:
        """Returns whether the table may have rules of a VM."""
        return self._loaded is None or vm_id in self._loaded

    def check_user(self, vm_id: int) -> None:
        """Checks a VM. :raises NetworkFailed: its rules can't be loaded, as no user of passt is free."""
        if self._loaded is None or vm_id not in self._loaded:
            raise NetworkFailed(
                "egress", "the rules of the VM can't be enforced: this daemon has no user for its passt that no other "
                "VM's passt has; create the VM again, or give the daemon more users (vm_uids)",
            )  # fmt: skip

    async def _replace(self, wanted: Mapping[int, EgressGuest]) -> Mapping[int, NetworkFailed]:
        """Creates the table, or removes that of an earlier daemon if no VM needs it."""
        # Only the kernel has the counters, and the addresses that an earlier daemon has allowed.
        listed = await self._backend.listed(f"table {self._settings.egress_table}")
        if not wanted and not listed:
            self._was_read = True
            self._note(wanted, {})
            return {}
        if not self._was_read:
            self._deadlines = _deadlines(listed, wanted)
        states, failures = await self._states(wanted, _counters(listed))
        text = self._everything(wanted, states)
        self._has_table = True
        if not wanted and not (self._passt is not None and await self._passt.any_runs()):
            # A passt without a row may belong to a VM that is to be adopted. It stays closed until then.
            text = delete_tables((self._settings.egress_table,))
            self._has_table = False
        await self._backend.load(text)
        self._was_read = True
        self._note(wanted, states)
        return failures

    async def _update(self, wanted: Mapping[int, EgressGuest]) -> Mapping[int, NetworkFailed]:
        """Changes the rules of new, changed and removed VMs."""
        loaded = self._loaded
        assert loaded is not None
        states, failures = await self._states(wanted, {})
        now = {vm_id: (guest, states[vm_id].port) for vm_id, guest in wanted.items()}
        gone = [held for vm_id, held in loaded.items() if now.get(vm_id) != held]
        new = [vm_id for vm_id, held in now.items() if loaded.get(vm_id) != held]
        if not gone and not new:
            return failures
        text = self._everything(wanted, states)
        if loaded:
            text = "".join(removed(self._settings, guest, port) for guest, port in gone)
            text += "".join(added(self._settings, wanted[vm_id], states[vm_id]) for vm_id in new)
        # Unknown until the change is confirmed.
        self._loaded = None
        self._has_table = True
        try:
            await self._backend.load(text)
        except NetworkFailed as error:
            _logger.warning("replacing the table of egress rules, as something else changed it: %s", error)
            return await self._replace(wanted)
        self._note(wanted, states)
        return failures

    def _everything(self, wanted: Mapping[int, EgressGuest], states: Mapping[int, EgressState]) -> str:
        users = self._passt.users if self._passt is not None else range(0)
        guests = [(guest, states[vm_id]) for vm_id, guest in wanted.items()]
        return egress_ruleset(self._settings, guests, users)

    def _note(self, wanted: Mapping[int, EgressGuest], states: Mapping[int, EgressState]) -> None:
        """Records the content of the table, and stops resolvers that no VM needs."""
        self._loaded = {vm_id: (guest, states[vm_id].port) for vm_id, guest in wanted.items()}
        self._with_user = {vm_id for vm_id, guest in wanted.items() if guest.user is not None}
        for vm_id in self._deadlines.keys() - wanted.keys():
            del self._deadlines[vm_id]
        for vm_id in self._listening - wanted.keys():
            self._listening.discard(vm_id)
            if self._resolvers is not None:
                self._resolvers.close(vm_id)

    async def _states(
        self, wanted: Mapping[int, EgressGuest], denied: Mapping[str, tuple[int, int]]
    ) -> tuple[dict[int, EgressState], dict[int, NetworkFailed]]:
        """Returns the state of each VM, and the VMs without a resolver: their rules are enforced, and names can't be
        resolved."""
        states: dict[int, EgressState] = {}
        failures: dict[int, NetworkFailed] = {}
        now = trio.current_time()
        for vm_id, guest in wanted.items():
            port = 0
            if self._resolvers is not None:
                try:
                    port = await self._resolvers.open(guest)
                    self._listening.add(vm_id)
                except NetworkFailed as error:
                    failures[vm_id] = error
            states[vm_id] = EgressState(
                port=port,
                allowed={
                    name: {address: until - now for address, until in held.items() if until > now}
                    for name, held in self._deadlines.get(vm_id, {}).items()
                },
                denied=denied.get(counter_name(vm_id), (0, 0)),
            )
        return states, failures

    async def _allow(self, requests: Sequence[_Request]) -> None:
        now = trio.current_time()
        texts = []
        for request in requests:
            try:
                texts.append(self._text_for(request, now))
            except NetworkFailed as failure:
                request.serve(failure)
        left = [request for request in requests if not request.is_served]
        try:
            if text := "".join(texts):
                await self._backend.load(text)
        except NetworkFailed as failure:
            if len(left) > 1:
                # One VM's must not fail those of others.
                for request in left:
                    await self._allow([request])
                return
            left[0].serve(failure)
            return
        for request in left:
            for name, addresses in request.added.items():
                held = self._deadlines.setdefault(request.vm_id, {}).setdefault(name, {})
                held.update({address: now + seconds for address, seconds in addresses.items()})
            request.serve(None)

    def _text_for(self, request: _Request, now: float) -> str:
        """Returns the text for a request. :raises NetworkFailed: the VM has no rules any more, or too many
        addresses."""
        if self._loaded is None or request.vm_id not in self._loaded:
            raise NetworkFailed("egress", "the rules of the VM are not loaded now")
        guest, _ = self._loaded[request.vm_id]
        sets = self._deadlines.setdefault(request.vm_id, {})
        request.added = {}
        for name, rules in sets_of(guest).items():
            if any(rule.matches(request.name) for rule in rules):
                held = sets[name] = {address: until for address, until in sets.get(name, {}).items() if until > now}
                request.added[name] = {
                    address: seconds
                    for address, seconds in request.addresses.items()
                    if held.get(address, 0.0) < now + seconds - _SLACK_S
                }
                if len(held.keys() | request.added[name].keys()) > MAX_ADDRESSES:
                    raise NetworkFailed("egress", f"{MAX_ADDRESSES} addresses of names are allowed already")
        return "".join(allowed(self._settings, name, addresses) for name, addresses in request.added.items())


def _needs_rules(row: VmRow) -> bool:
    return is_restricted(row.egress) and (needs_tap(row) or has_passt(row))


class _Request:
    """Addresses that a resolver wants to allow."""

    def __init__(self, vm_id: int, name: str, addresses: Addresses) -> None:
        self.vm_id = vm_id
        self.name = name
        self.addresses = addresses
        self.added: dict[str, Addresses] = {}
        """Addresses by set that the kernel does not allow for long enough yet."""
        self.is_served = False
        self.failure: NetworkFailed | None = None

    def serve(self, failure: NetworkFailed | None) -> None:
        self.is_served = True
        self.failure = failure


def _deadlines(
    listed: Sequence[Mapping[str, Any]], wanted: Mapping[int, EgressGuest]
) -> dict[int, dict[str, dict[str, float]]]:
    """Returns when the permission of addresses ends in the kernel."""
    now = trio.current_time()
    owners = {name: vm_id for vm_id, guest in wanted.items() for name in sets_of(guest)}
    found: dict[int, dict[str, dict[str, float]]] = {}
    for entry in listed:
        held = entry.get("set", {})
        if (vm_id := owners.get(held.get("name", ""))) is not None:
            found.setdefault(vm_id, {})[held["name"]] = {
                str(value): now + left_s for value, left_s in _elements_of(held)
            }
    return found


def _counters(listed: Sequence[Mapping[str, Any]]) -> dict[str, tuple[int, int]]:
    """Returns packets and bytes of each counter."""
    counters = (entry["counter"] for entry in listed if "counter" in entry)
    return {counter["name"]: (int(counter["packets"]), int(counter["bytes"])) for counter in counters}


def _elements_of(held: Mapping[str, Any]) -> Iterable[tuple[Any, float]]:
    """Yields the elements of a set with timeouts, each with its remaining seconds."""
    for each in held.get("elem", ()):
        if isinstance(each, dict) and isinstance(element := each.get("elem"), dict):
            yield element.get("val"), float(element.get("expires", 0))
