"""Makes of the host what the rows say: all of it, or what one more VM needs.

**All of it** is looked at when an actor begins, when somebody asks, and when something was not as it should have been.
**One VM more or less** is that VM's tap and a few elements of the firewall's sets; so the thousandth costs what the
first did. What was loaded into the firewall is remembered for that. Where memory and host differ, as somebody has had a
hand in them, nftables refuses the change or the tap finds no bridge; then all of it is looked at. A tap that can't be
had keeps no other VM waiting: it stays lacking, and is tried again with whatever is done next.

The firewall goes first, as it knows taps by name: a tap that has no rules yet reaches nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from volant.model import VmRow, tap_of

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
from ._passt import Passt
from ._passt_filter import PasstFilter
from ._plan import (
    NetworkPlan,
    NetworkSettings,
    check_bridge,
    check_subnets,
    has_tap,
    is_ours,
    is_tap,
    make_tap,
    may_be_ours,
    plan_of,
    steps_to,
)
from ._rules import Rules, change, nothing, rules_of, whole

_logger = logging.getLogger("volant.network")


class Networks:
    """The host's side of the networks of one daemon. One call at a time."""

    def __init__(
        self,
        backend: NetworkBackend,
        settings: NetworkSettings,
        rows: Callable[[], Iterable[VmRow]],
        passt: Passt | None = None,
    ) -> None:
        """`passt`: None: there are no VMs with the network `user`."""
        self.passts = PasstFilter(backend, settings, rows, passt)
        """What their processes may reach."""
        self._backend = backend
        self._settings = settings
        self._rows = rows
        self._loaded: Rules | None = None
        """What the firewall is, as far as we know; None: we don't."""
        self._gateways: object = None
        """What the bridge has for addresses, once all has been looked at."""
        self._lacking: Mapping[int, NetworkFailed] = {}
        self._left: tuple[str, ...] = ()
        self._counts = {"reconciled": 0, "mended": 0}

    def statistics(self) -> dict[str, object]:
        """For people."""
        plan = self._plan()
        return {
            "bridge": self._settings.bridge_name,
            "subnet": str(self._settings.subnet),
            "taps": len(plan.taps),
            "ports": sum(len(tap.ports) for tap in plan.taps),
            "lacking": sorted(self._lacking),
            "left_in_use": self._left,
            **self._counts,
        }

    async def obstacle(self) -> str | None:
        """Why no VM can have a tap here, and what to do; None: nothing is in the way, as far as can be seen."""
        settings = self._settings
        plan = plan_of(settings, ())
        try:
            await self._backend.ready()
            links: Sequence[Link] = ()
            if settings.bridge_name in await self._backend.names():
                links = await self._backend.links({settings.bridge_name})
            check_bridge(settings, links)
            check_subnets(plan, await self._backend.routes(), links)
            # A kernel has all that they need, or not: the family of bridges tells of bridges, too.
            await self._backend.check(whole(rules_of(plan)))
        except NetworkFailed as error:
            return str(error)
        return None

    def has_taps(self) -> bool:
        """Whether a VM should have a tap."""
        return any(map(has_tap, self._rows()))

    async def reconcile(self) -> Mapping[int, NetworkFailed]:
        """See to all of it; the VMs whose taps can't be had, and why.

        :raises NetworkFailed: nobody's can.
        """
        plan, settings = self._plan(), self._settings
        self._loaded = self._gateways = None
        self._lacking = {}
        if not plan.taps and not await self._is_begun():
            return {}
        await self._backend.ready()
        links = await self._backend.links()
        steps = steps_to(plan, links)
        check_subnets(plan, await self._backend.routes(), links)
        await self._change(rules_of(plan))
        failures = await self._do(plan, steps)
        self._gateways = plan.gateways
        wanted = {tap.name for tap in plan.taps}
        self._left = tuple(
            link.name for link in links if link.in_use and link.name not in wanted and is_tap(settings, link)
        )
        for name in self._left:
            _logger.warning("the tap %s is no VM's, and stays as a process has it open", name)
        self._counts["reconciled"] += 1
        return failures

    async def ensure(self, vm_ids: Collection[int]) -> Mapping[int, NetworkFailed]:
        """See to these VMs' taps and rules; those, also of others, that can't be as they should, and why.

        :raises NetworkFailed: none can.
        """
        plan = self._plan()
        if plan.gateways == self._gateways:
            try:
                return await self._see_to(plan, vm_ids)
            except BridgeDown as error:
                _logger.warning("all of the network is looked at: %s", error)
                self._counts["mended"] += 1
        failures = await self.reconcile()
        if self._gateways is None:
            return failures
        return await self._see_to(self._plan(), vm_ids)

    async def _see_to(self, plan: NetworkPlan, vm_ids: Collection[int]) -> dict[int, NetworkFailed]:
        """What these VMs need, and those that lack their taps, where all else is as it should be.

        :raises BridgeDown: it is not.
        """
        settings = plan.settings
        taps = [tap for tap in plan.taps if tap.vm_id in vm_ids or tap.vm_id in self._lacking]
        going = {tap_of(settings.instance, vm_id): vm_id for vm_id in set(vm_ids) - {tap.vm_id for tap in taps}}
        await self._change(rules_of(plan))
        return await self._do(
            plan,
            [
                *(make_tap(plan, tap) for tap in taps),
                # Nothing of these VMs runs any more, so whoever has such a tap open is nobody to wait for.
                *(RemoveLink(name=name, kind="tun") for name in going),
                *(ForgetConnections(address=address) for address in self._addresses(going.values())),
                SetLocalnet(bridge=settings.bridge_name, on=plan.localnet),
            ],
            going,
        )

    @property
    def stands(self) -> bool:
        """Whether there is anything of ours, and all of it as it should be, as far as we know."""
        return self._gateways is not None

    @property
    def lacking(self) -> Mapping[int, NetworkFailed]:
        """The VMs that should have a tap and have none that is as it should be, and why."""
        return self._lacking

    async def watch(self, torn: Callable[[str], None]) -> None:
        """Call `torn` each time that somebody has taken what is everybody's away, with what has happened."""
        await self._backend.watch(
            self._settings.bridge_name, (*self._settings.tables, self._settings.passt_table), torn
        )

    async def remove_unused(self) -> None:
        """Take all of it away, unless a VM should have a tap, or a process has one open: it may be a VM's that is found
        again.

        :raises NetworkFailed: something is left.
        """
        if self.has_taps() or not await self._is_begun():
            return
        if any(link.in_use and is_tap(self._settings, link) for link in await self._backend.links()):
            return
        await self.remove()

    async def remove(self) -> None:
        """Take all of it away. :raises NetworkFailed: something is left."""
        self._loaded = self._gateways = None
        if not await self._is_begun():
            return
        links = [link for link in await self._backend.links() if is_ours(self._settings, link)]
        results = await self._backend.do([RemoveLink(name=link.name, kind=link.kind) for link in links])
        await self._backend.load(nothing(self._settings.tables))
        for failure in filter(None, results):
            raise failure

    def _addresses(self, vm_ids: Collection[int]) -> list[str]:
        """The addresses of VMs whose processes have ended; their rows are still there."""
        return [row.lease.address for row in self._rows() if row.id in vm_ids and row.lease is not None]

    def _plan(self) -> NetworkPlan:
        return plan_of(self._settings, self._rows())

    async def _is_begun(self) -> bool:
        """Whether anything of ours may be on the host. Not before a VM needed it: a daemon without networks leaves the
        host's alone, and needs no leave to touch them."""
        return any(may_be_ours(self._settings, name) for name in await self._backend.names())

    async def _change(self, rules: Rules) -> None:
        """Have the firewall be this one."""
        before, self._loaded = self._loaded, None
        text = change(before, rules)
        if text:
            try:
                await self._backend.load(text)
            except NetworkFailed as error:
                if text == whole(rules):
                    raise
                _logger.warning("the firewall is not as it was left, and is replaced: %s", error)
                self._counts["mended"] += 1
                await self._backend.load(whole(rules))
        self._loaded = rules

    async def _do(
        self, plan: NetworkPlan, steps: list[Step], going: Mapping[str, int] | None = None
    ) -> dict[int, NetworkFailed]:
        """What failed, by VM. `going`: whose taps those are that somebody waits to see gone. The steps make, or make
        again, the tap of each VM that lacks it.

        :raises NetworkFailed: what failed is everybody's.
        """
        vm_ids = {tap.name: tap.vm_id for tap in plan.taps} | dict(going or {})
        failures: dict[int, NetworkFailed] = {}
        lacking: dict[int, NetworkFailed] = {}
        for step, failure in zip(steps, await self._backend.do(steps), strict=True):
            if isinstance(failure, BridgeDown):
                raise failure
            match step:
                case MakeTap(name=name) if failure is not None:
                    failures[vm_ids[name]] = lacking[vm_ids[name]] = failure
                case RemoveLink(name=name) if failure is not None and going and name in going:
                    failures[going[name]] = failure
                case RemoveLink() | ForgetConnections() if failure is not None:
                    _logger.warning("%s", failure)
                case _ if failure is not None:
                    raise failure
        self._lacking = lacking
        return failures
