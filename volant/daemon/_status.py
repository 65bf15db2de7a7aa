"""The status of the daemon for clients, as `/system`, and for the service manager."""

from __future__ import annotations

import platform
from collections.abc import Mapping

import trio

from actors import ActorDown, AskTimeout, Ref, System
from volant import __version__
from volant.host import Host
from volant.hypervisor import AcceleratorChoice, Hypervisor
from volant.hypervisor.qemu import SandboxPlan
from volant.journal import Journal, StillThere, Store
from volant.model import Status
from volant.operations import Health

from ._admission import Admission
from ._guest_networks import GuestNetworks
from ._leftovers import Leftovers
from ._settings import shown

_JOURNAL_S = 60.0


class DaemonStatus:
    """The status of one daemon. `Daemon` sets the facts that become known while it runs.

    :param sandbox: the sandbox of its hypervisors; None for none
    :param stopping: set when it begins to stop
    """

    def __init__(
        self,
        host: Host,
        store: Store,
        journal: Ref[Journal],
        hypervisor: Hypervisor,
        sandbox: SandboxPlan | None,
        admission: Admission,
        networks: GuestNetworks,
        leftovers: Leftovers,
        stopping: trio.Event,
    ) -> None:
        self._store = store
        self._journal = journal
        self._hypervisor = hypervisor
        self._sandbox = sandbox
        self._admission = admission
        self._networks = networks
        self._leftovers = leftovers
        self._stopping = stopping
        self.started_at = host.clock.now()
        self.adoption_s: float | None = None
        """How long the adoption of VMs took at the start; None until it is done."""
        self.system: System | None = None
        """The supervisor tree, once it runs."""
        self.choice: AcceleratorChoice | None = None
        """The result of the probe of accelerators, once it has finished."""

    # For the API

    def health(self) -> Health:
        """Returns `ok` if the tree is complete and changes can be made. A failed VM or a missing hypervisor does not
        count."""
        if self._stopping.is_set():
            return "stopping"
        if self.adoption_s is None or self.system is None:
            return "starting"
        return "ok" if self.system.all_running() and self._store.trouble is None else "degraded"

    def tree(self) -> Mapping[str, object]:
        """Returns the supervisor tree, ready for JSON."""
        return self.system.tree() if self.system is not None else {}

    def info(self) -> Mapping[str, object]:
        """Returns versions, addresses, directories and settings, ready for JSON."""
        store, settings, choice = self._store, self._admission.settings, self.choice
        certificate = self._admission.certificate
        return {
            "version": __version__,
            "addresses": list(self._admission.addresses),
            "tls": None if certificate is None else certificate.view(),
            "python": platform.python_version(),
            "kernel": platform.release(),
            "hypervisor": self._hypervisor.name,
            "hypervisor_version": choice.version if choice else None,
            "accelerator": choice.accelerator if choice else None,
            "accelerator_reason": choice.reason if choice else "the probe has not finished",
            **self._networks.view(),
            "sandbox": None if self._sandbox is None else self._sandbox.view(),
            "state_dir": str(settings.state_dir),
            "runtime_dir": str(settings.runtime_dir),
            "cache_dir": str(settings.cache_dir),
            "settings": shown(settings),
            "journal": {"trouble": store.trouble},
            "event_epoch": store.projection.last_event.epoch,
            "orphans": self._leftovers.view(),
            "started_at": self.started_at,
        }

    # For the service manager

    def is_ready(self) -> bool:
        """Returns whether all VMs were adopted."""
        return self.adoption_s is not None

    async def find_problem(self) -> str | None:
        """Returns why the daemon does not work, or None. Asks its parts through the event loop."""
        if self.system is not None and not self.system.all_running():
            return "a part of the daemon is down and can't be restarted"
        try:
            # The caller has a shorter deadline.
            await self._journal.ask(StillThere(), timeout_s=_JOURNAL_S)
        except (ActorDown, AskTimeout) as error:
            return f"the journal does not answer: {error}"
        return None

    def summary(self) -> str:
        """Returns one line for people."""
        store = self._store
        rows = store.projection.rows()
        running = sum(row.status is Status.RUNNING for row in rows)
        said = f"{len(rows)} VMs, {running} running" if rows else "no VMs"
        if store.trouble is not None:
            said += f"; {store.trouble}"
        return said if store.projection.drain is None else f"{said}, draining"
