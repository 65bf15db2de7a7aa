"""Makes the host match the rows, for everything or only for some VMs.

**Everything** is reconciled when the actor starts, on request, and when something on the host was not as expected.
**For some VMs** only their taps and a few elements of the firewall's sets change, so the thousandth VM costs no more
than the first. For that the loaded ruleset is remembered. If something else on the host changed it, nftables refuses
the change, or a tap finds no bridge; then everything is reconciled. A tap that can't be created delays no other VM: it
is retried with the next change.

The firewall is loaded first, as its rules name taps: a tap without rules reaches nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from volant.model import VmRow, is_restricted, tap_of

from ._backend import (
    BridgeDown,
    ForgetConnections,
    Link,
    MakeTap,
    NetworkBackend,
    NetworkFailed,
    RemoveLink,
    SetLocalnet,
    Step,
)
from ._egress import EgressFilter, Resolvers
from ._passt import Passt
from ._passt_filter import PasstFilter
from ._plan import (
    NetworkPlan,
    NetworkSettings,
    check_bridge,
    check_subnets,
    is_ours,
    is_tap,
    make_tap,
    may_be_ours,
    needs_tap,
    plan_of,
    steps_to,
)
from ._rules import Rules, delete_tables, full_ruleset, rules_of, ruleset_changes

_logger = logging.getLogger("volant.network")


class Networks:
    """Manages the host's networks for one daemon. One call at a time."""

    def __init__(
        self,
        backend: NetworkBackend,
        settings: NetworkSettings,
        rows: Callable[[], Iterable[VmRow]],
        passt: Passt | None = None,
        resolvers: Resolvers | None = None,
    ) -> None:
        """Creates it. `passt` is None if no VM has the network `user`; `resolvers` is None if VMs with an egress policy
        can't resolve names."""
        self.egress = EgressFilter(backend, settings, rows, passt, resolvers)
        self.passt_filter = PasstFilter(backend, settings, rows, passt)
        self._backend = backend
        self._settings = settings
        self._rows = rows
        self._loaded: Rules | None = None
        """The ruleset that was loaded last; None if unknown."""
        self._has_tables = False
        """Whether the firewall may have the daemon's tables, even if none of its links exists."""
        self._gateways: object = None
        """The bridge's addresses after a complete reconciliation; None before."""
        self._not_enforced: Mapping[int, NetworkFailed] = {}
        """The VMs whose egress policy is not enforced completely, and why."""
        self._without_tap: Mapping[int, NetworkFailed] = {}
        self._left_in_use: tuple[str, ...] = ()
        self._counts = {"reconciled": 0, "repaired": 0}

    def statistics(self) -> dict[str, object]:
        """Returns statistics for `inspect`."""
        plan = self._plan()
        return {
            "bridge": self._settings.bridge_name,
            "subnet": str(self._settings.subnet),
            "taps": len(plan.taps),
            "ports": sum(len(tap.ports) for tap in plan.taps),
            "without_tap": sorted(self._without_tap),
            "left_in_use": self._left_in_use,
            **self._counts,
        }

    async def obstacle(self) -> str | None:
        """Returns why no VM can have a tap on this host and what to do, or None. Changes nothing."""
        settings = self._settings
        plan = plan_of(settings, ())
        try:
            await self._backend.ready()
            links: Sequence[Link] = ()
            if settings.bridge_name in await self._backend.names():
                links = await self._backend.links({settings.bridge_name})
            check_bridge(settings, links)
            check_subnets(plan, await self._backend.routes(), links)
            # The table of the family `bridge` shows whether the kernel has bridges, too.
            await self._backend.check(full_ruleset(rules_of(plan)))
        except NetworkFailed as error:
            return str(error)
        return None

    async def reconcile(self) -> Mapping[int, NetworkFailed]:
        """Makes the whole host match the rows. Returns the VMs whose taps failed.

        :raises NetworkFailed: when something failed that all VMs need.
        """
        plan, settings = self._plan(), self._settings
        self._loaded = self._gateways = None
        self._without_tap = {}
        if not plan.taps and not await self._may_exist():
            return {}
        await self._backend.ready()
        links = await self._backend.links()
        steps = steps_to(plan, links)
        check_subnets(plan, await self._backend.routes(), links)
        await self._load_firewall(plan)
        failures = await self._run_steps(plan, steps)
        self._gateways = plan.gateways
        wanted = {tap.name for tap in plan.taps}
        self._left_in_use = tuple(
            link.name for link in links if link.in_use and link.name not in wanted and is_tap(settings, link)
        )
        for name in self._left_in_use:
            _logger.warning("the tap %s belongs to no VM; it is kept, as a process has it open", name)
        self._counts["reconciled"] += 1
        return failures

    async def ensure(self, vm_ids: Collection[int]) -> Mapping[int, NetworkFailed]:
        """Sets up or removes the taps and rules of these VMs. Returns the VMs, others included, whose taps failed.

        :raises NetworkFailed: when something failed that all VMs need.
        """
        plan = self._plan()
        if plan.gateways == self._gateways:
            try:
                return await self._update(plan, vm_ids)
            except BridgeDown as error:
                _logger.warning("reconciling the whole network: %s", error)
                self._counts["repaired"] += 1
        failures = await self.reconcile()
        if self._gateways is None:
            return failures
        return await self._update(self._plan(), vm_ids)

    async def _update(self, plan: NetworkPlan, vm_ids: Collection[int]) -> dict[int, NetworkFailed]:
        """Sets up or removes the taps and rules of these VMs and of VMs without their taps.

        :raises BridgeDown: when the bridge is not as it was left.
        """
        settings = plan.settings
        taps = [tap for tap in plan.taps if tap.vm_id in vm_ids or tap.vm_id in self._without_tap]
        detached = {tap_of(settings.instance, vm_id): vm_id for vm_id in set(vm_ids) - {tap.vm_id for tap in taps}}
        await self._load_firewall(plan)
        return await self._run_steps(
            plan,
            [
                *(make_tap(plan, tap) for tap in taps),
                # Even if a process has the tap open: no process of this VM runs any more.
                *(RemoveLink(name=name, kind="tun") for name in detached),
                *(ForgetConnections(address=address) for address in self._addresses(detached.values())),
                SetLocalnet(bridge=settings.bridge_name, on=plan.localnet),
            ],
            detached,
        )

    async def confine(self, vm_id: int) -> None:
        """Filters the destinations of a VM's passt; see `Confine`. :raises NetworkFailed:"""
        if self.passt_filter.is_possible:
            await self.passt_filter.ensure()
        if not any(row.id == vm_id and is_restricted(row.egress) for row in self._rows()):
            return
        if not self.passt_filter.is_possible:
            raise NetworkFailed("egress", "this host can't filter what passt sends, and the VM has an egress policy")
        failures = await self.egress.ensure()
        self.egress.check_user(vm_id)
        if vm_id in failures:
            raise failures[vm_id]

    async def release(self, vm_id: int) -> None:
        """Removes the egress rules of a VM whose passt has ended. :raises NetworkFailed:"""
        if self.egress.has(vm_id):
            await self.egress.ensure(detached={vm_id})

    def forget(self) -> None:
        """Records that tables may have been removed."""
        self.passt_filter.forget()
        self.egress.forget()

    @property
    def is_complete(self) -> bool:
        """Whether the networks exist and were reconciled completely."""
        return self._gateways is not None

    @property
    def without_tap(self) -> Mapping[int, NetworkFailed]:
        """The VMs whose taps failed, and why."""
        return self._without_tap

    async def watch(self, on_loss: Callable[[str], None]) -> None:
        """Calls `on_loss` with a description whenever the bridge or a table is removed. Never returns."""
        settings = self._settings
        tables = (*settings.tables, settings.passt_table, settings.egress_table)
        await self._backend.watch(settings.bridge_name, tables, on_loss)

    async def remove_unused(self) -> None:
        """Removes everything, unless a VM needs a tap or a process has one open: that may be a VM to be adopted.

        :raises NetworkFailed: when a part can't be removed.
        """
        if any(map(needs_tap, self._rows())) or not await self._may_exist():
            return
        if any(link.in_use and is_tap(self._settings, link) for link in await self._backend.links()):
            return
        await self.remove()

    async def remove_unused_egress(self) -> None:
        """Removes the egress rules, unless a VM needs them or may be adopted. :raises NetworkFailed:"""
        if not self.egress.is_loaded or await self.passt_filter.is_needed():
            return
        if not any(link.in_use and is_tap(self._settings, link) for link in await self._backend.links()):
            await self.egress.remove_unused()

    async def remove(self) -> None:
        """Removes everything. :raises NetworkFailed: when a part can't be removed."""
        self._loaded = self._gateways = None
        if not await self._may_exist():
            return
        self._has_tables = True
        links = [link for link in await self._backend.links() if is_ours(self._settings, link)]
        results = await self._backend.do([RemoveLink(name=link.name, kind=link.kind) for link in links])
        await self._backend.load(delete_tables(self._settings.tables))
        self._has_tables = False
        for failure in filter(None, results):
            raise failure

    def _addresses(self, vm_ids: Collection[int]) -> list[str]:
        """Returns the addresses of VMs that have rows."""
        return [row.lease.address for row in self._rows() if row.id in vm_ids and row.lease is not None]

    def _plan(self) -> NetworkPlan:
        return plan_of(self._settings, self._rows())

    async def _may_exist(self) -> bool:
        """Returns whether the host may have links or tables of this daemon. If not, a daemon without networks needs no
        rights."""
        return self._has_tables or any(may_be_ours(self._settings, name) for name in await self._backend.names())

    async def _load_firewall(self, plan: NetworkPlan) -> None:
        """Loads the egress rules, then the tables that let guests send, then removes the egress rules of VMs that are
        not in those tables any more. So a guest sends nothing while its egress policy is not enforced."""
        restricted = [tap.vm_id for tap in plan.taps if tap.restricted]
        closed: Collection[int] = ()
        try:
            self._not_enforced = await self.egress.ensure()
        except NetworkFailed as error:
            self._not_enforced = dict.fromkeys(restricted, error)
            closed = restricted
            _logger.error("VMs with an egress policy can't send anything: %s", error)
        await self._load_rules(rules_of(plan, closed=closed, uplinks=await self._backend.uplinks()))
        on_bridge = {row.id for row in self._rows() if row.lease is not None and row.lease.tap}
        try:
            if not closed:
                self._not_enforced = await self.egress.ensure(detached=on_bridge - {tap.vm_id for tap in plan.taps})
        except NetworkFailed as error:
            self._not_enforced = dict.fromkeys(restricted, error)
            _logger.error("the egress rules of VMs that have ended can't be removed: %s", error)

    async def _load_rules(self, rules: Rules) -> None:
        before, self._loaded = self._loaded, None
        self._has_tables = True
        text = ruleset_changes(before, rules)
        if text:
            try:
                await self._backend.load(text)
            except NetworkFailed as error:
                if text == full_ruleset(rules):
                    raise
                _logger.warning("replacing the firewall's tables, as something else changed them: %s", error)
                self._counts["repaired"] += 1
                await self._backend.load(full_ruleset(rules))
        self._loaded = rules

    async def _run_steps(
        self, plan: NetworkPlan, steps: list[Step], detached: Mapping[str, int] | None = None
    ) -> dict[int, NetworkFailed]:
        """Runs steps, among them those for every VM without its tap. Returns the failures by VM.

        :param detached: the VMs of taps whose removal must succeed
        :raises NetworkFailed: when something failed that all VMs need.
        """
        detached = detached or {}
        vm_ids = {tap.name: tap.vm_id for tap in plan.taps}
        failures: dict[int, NetworkFailed] = {}
        without_tap: dict[int, NetworkFailed] = {}
        for step, failure in zip(steps, await self._backend.do(steps), strict=True):
            if isinstance(failure, BridgeDown):
                raise failure
            match step:
                case MakeTap(name=name) if failure is not None:
                    failures[vm_ids[name]] = without_tap[vm_ids[name]] = failure
                case RemoveLink(name=name) if failure is not None and name in detached:
                    failures[detached[name]] = failure
                case RemoveLink() | ForgetConnections() if failure is not None:
                    _logger.warning("%s", failure)
                case _ if failure is not None:
                    raise failure
        for vm_id in vm_ids.values():
            if (failed := self._not_enforced.get(vm_id)) is not None:
                failures.setdefault(vm_id, failed)
                without_tap.setdefault(vm_id, failed)
        self._without_tap = without_tap
        return failures
