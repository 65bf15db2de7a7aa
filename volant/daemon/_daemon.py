"""The parts of a daemon in their order, and its life cycle: it runs its supervisor tree, adopts VMs, and stops.

When it stops, streams end first, then the tree stops in reverse order: the API, the VMs' actors, the journal. VMs keep
running, unless the daemon is ephemeral.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import trio

from actors import ONE_FOR_ONE, Child, DynamicSupervisor, GaveUp, Supervisor, System, open_system
from volant.api import create_app
from volant.directories import Virtiofsd
from volant.egress import DnsSockets, EgressActivity
from volant.host import Host, own_cgroups, raise_own
from volant.http import serve
from volant.hypervisor import Hypervisor
from volant.hypervisor.qemu import QemuHypervisor, SandboxPlan
from volant.images import ArtifactCache
from volant.journal import OWN_NAMES, Backups, Journal, JournalRef, Recorder, Retention, Store, take_over
from volant.logs import VmLogs
from volant.model import Networking, parse_subnet
from volant.network import NetworkBackend
from volant.oci import ImageLibrary, ImageService
from volant.operations import ApiDeps
from volant.operations.projects import clear_project
from volant.secrets import KeyFile, Secrets
from volant.transfer import BaseFiles, Transfers
from volant.vm import Vms, image_users, instance_of, keep_drained

from ._admission import Admission, Reload, checked
from ._boots import Boots, directory_obstacle, own_places, sandbox_plan
from ._directories import confine, log_dir, secrets_key_file
from ._dump import dump_on_signal
from ._fleet import end_former_fleet, freezer_of
from ._guest_networks import GuestNetworks
from ._image_events import ImageEvents
from ._leftovers import Leftovers, evidence_of
from ._part_settings import image_settings, transfer_settings, vm_settings
from ._settings import Settings, host_dirs_of, origins_of, parse_uids
from ._status import DaemonStatus
from ._systemd import Notifier

if TYPE_CHECKING:
    from volant.fleet import KeyValues

    from ._fleet import FleetMember

_logger = logging.getLogger("volant.daemon")

_EPHEMERAL_STOP_S = 25.0
_STREAMS_STOP_S = 3.0
"""Deadline for the API to close its streams; the API has a shorter deadline of its own."""


class Daemon:
    """Assembles the daemon, and runs it."""

    def __init__(
        self,
        settings: Settings,
        sockets: list[socket.socket],
        reload: Reload | None = None,
        notifier: Notifier | None = None,
        *,
        host: Host | None = None,
        network: NetworkBackend | None = None,
        dns: DnsSockets | None = None,
        oci: ImageLibrary | None = None,
        fleet_sockets: Sequence[socket.socket] = (),
        etcd: KeyValues | None = None,
    ) -> None:
        """Creates it. `etcd` replaces the settings' own etcd of the fleet. :raises SettingsError: the daemon must not
        run with these."""
        self._notifier = notifier or Notifier(None)
        as_service = self._notifier.is_there
        given = checked(settings, as_service=as_service)
        self._sockets = sockets
        self.stopping = trio.Event()
        self._served = trio.Event()
        instance = instance_of(settings.state_dir)

        # The host, and what is kept on its disk.
        self.host = host or _host(self._notifier, settings)
        confine(self.host, settings)
        self.store = Store(
            self.host,
            settings.state_dir / "volant.db",
            retention=Retention(max_records=settings.audit_max_records, records_max_age_s=settings.audit_max_age_s),
            networking=Networking(subnet=parse_subnet(settings.subnet), instance=instance),
        )
        projection = self.store.projection
        self._journal = Child("journal", partial(Journal, self.store), shutdown_s=10)
        self.logs = VmLogs(self.host, log_dir(settings))
        self._leftovers = Leftovers(self.host, settings, self.store)
        key_file = KeyFile(self.host, secrets_key_file(settings))

        # The fleet. What its hosts share, they have to agree on.
        self._member = self._join_fleet(settings, fleet_sockets, etcd, key_file)
        journal: JournalRef = self._journal.ref if self._member is None else self._member.fleet.definitions

        # Access to the API, and the networks that remain for VMs.
        self._admission = Admission(given, sockets, reload, self.host, self.store, journal, as_service=as_service)
        self._networks = GuestNetworks(settings, self.host, self.store, self._admission, instance, network, dns)

        # How guests run.
        sandbox = _sandbox(self.host, settings)
        self.hypervisor: Hypervisor = QemuHypervisor(
            self.host,
            settings.cache_dir,
            accelerator=None if settings.accelerator == "auto" else settings.accelerator,
            sandbox=sandbox,
        )
        self._boots = Boots(settings, self.host, self.hypervisor, projection, instance)
        virtiofsd = Virtiofsd(
            host=self.host,
            runtime_dir=settings.runtime_dir,
            instance=instance,
            allowed=host_dirs_of(settings),
            user_of=self.hypervisor.user_of,
            places=(*own_places(settings), secrets_key_file(settings)),
            obstacle=directory_obstacle(sandbox, settings),
        )

        # The sources of boots.
        artifacts = ArtifactCache(
            settings.cache_dir,
            settings.state_dir,
            timeout_s=settings.artifact_timeout_s,
            max_mb=settings.artifact_max_mb,
            origins=origins_of(settings),
        )
        self._image_events = ImageEvents(self._journal.ref)
        self._images = ImageService(
            self.host,
            image_settings(settings, os.environ, sandbox, artifacts),
            users=partial(image_users, projection),
            observe=self._image_events.observe,
        )
        self.oci: ImageLibrary = oci or self._images

        # The VMs.
        self._supervisor = DynamicSupervisor(intensity=3, period_s=60, gave_up=self._gave_up)
        self.vms = Vms(
            host=self.host,
            hypervisor=self.hypervisor,
            journal=self._journal.ref,
            store=self.store,
            logs=self.logs,
            artifacts=artifacts,
            oci=self.oci,
            templates=self._boots.templates,
            builder=self._boots.keeper.ref,
            warm_pool=self._boots.warm_pool,
            slots=self._boots.slots,
            passt=self._networks.passt,
            virtiofsd=virtiofsd,
            secrets=Secrets(self.host, self.store, journal, key_file),
            network=self._networks.keeper.ref,
            supervisor=self._supervisor,
            settings=vm_settings(settings),
            instance=instance,
            names=OWN_NAMES if self._member is None else self._member.fleet.names,
            fence=None if self._member is None else self._member.failover,
        )
        self._transfers = Transfers(
            self.host,
            self.store,
            self.vms.copies,
            BaseFiles(artifacts, self.oci, self.vms.settings),
            transfer_settings(settings, os.environ),
        )

        # The parts for requests of clients.
        self.status = DaemonStatus(
            self.host,
            self.store,
            self._journal.ref,
            self.hypervisor,
            sandbox,
            self._admission,
            self._networks,
            self._leftovers,
            self.stopping,
        )
        self.app = create_app(
            ApiDeps(
                vms=self.vms,
                journal=journal,
                store=self.store,
                logs=self.logs,
                backups=Backups(self.host, self.store),
                host=self.host,
                oci=self.oci,
                transfers=self._transfers,
                system=self.status,
                access=self._admission.access,
                keys=self._admission.keys,
                egress=EgressActivity(self._networks.egress, self._networks.resolvers),
                recorder=Recorder(self._journal.ref, self.store),
                fleet=None if self._member is None else self._member.fleet,
            )
        )

    def _join_fleet(
        self, settings: Settings, sockets: Sequence[socket.socket], etcd: KeyValues | None, key_file: KeyFile
    ) -> FleetMember | None:
        if not settings.fleet_etcd:
            return None
        from ._fleet import FleetMember

        return FleetMember(
            settings,
            self.host,
            self.store,
            sockets,
            etcd,
            journal=self._journal.ref,
            key_file=key_file,
            clear=lambda project: clear_project(self.logs, self.oci, project),
            accelerator=lambda: self.status.choice.accelerator if self.status.choice else None,
            vms=lambda: self.vms,
            transfers=lambda: self._transfers,
            freezer=freezer_of(self.host, settings, self._notifier.scopes()),
        )

    def _children(self) -> list[Child[Any]]:
        """Returns the supervisor tree, in the order of its start."""
        own_images = [Child("oci", self._images.keep, shutdown_s=10)] if self.oci is self._images else []
        redeem = self._admission.access.tickets.redeem
        fleet = [] if self._member is None else self._member.children(self.app, redeem, self.stopping)
        return [
            self._journal,
            *self._admission.children(self._networks.choose),
            *self._networks.children(),
            Child("logs", self.logs.keep),
            Child("image_events", self._image_events.keep),
            *own_images,
            self._boots.keeper,
            Child("snapshots", self.vms.copies.keep),
            Child("volumes", self.vms.volumes.keep),
            Child("vms", self._supervisor),
            Child("api", self._serve, shutdown_s=10),
            *fleet,
        ]

    # Its life

    @property
    def settings(self) -> Settings:
        """The current settings, which a reload may have replaced."""
        return self._admission.settings

    @property
    def system(self) -> System | None:
        """The supervisor tree; None if it does not run yet."""
        return self.status.system

    async def run(self, signals: AsyncIterator[int]) -> list[str]:
        """Runs until a signal, then stops. Returns the names of the VMs that exist at the end."""
        async with self.running() as nursery:
            lines = [f"volantd: listening on {address}" for address in self._admission.addresses]
            if self._admission.certificate is not None:
                fingerprint = self._admission.certificate.fingerprint
                lines.append(f"volantd: the certificate's SHA-256 fingerprint is {fingerprint}")
            _say(lines)
            status = self.status
            nursery.start_soon(self._notifier.keep, status.is_ready, status.find_problem, status.summary)
            nursery.start_soon(dump_on_signal)
            await self._until_stopped(signals)
            self._notifier.stopping("Stopping, VMs too" if self.settings.ephemeral else "Stopping; VMs keep running")
            nursery.start_soon(self._hurry, signals, nursery.cancel_scope)
            await self.drain()
        _logger.info("stopped")
        return [row.name for row in self.store.projection.rows()]

    async def _until_stopped(self, signals: AsyncIterator[int]) -> None:
        async for signum in signals:
            if signum != signal.SIGHUP:
                _logger.info("stopping: %s", signal.Signals(signum).name)
                return
            with self._notifier.reloading():
                await self._admission.reload(self._changed_access)

    @asynccontextmanager
    async def running(self, rng: Random | None = None) -> AsyncIterator[trio.Nursery]:
        """Runs the tree during the block. Adopts VMs in the nursery that it yields.

        :param rng: the source of randomness in the tree
        :raises OSError: a restored database can't replace the old one.
        """
        aside = await self.host.threads.run(take_over, self.host, self.store.path)
        if aside is not None:
            _logger.warning("using the restored database; the previous one is %s", aside)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._networks.find_obstacles)
            # A database that was lost or replaced by hand does not know which ids are used.
            evidence = await evidence_of(self.host, self.settings, self.logs)
            self.store.ids_taken = max(self.store.ids_taken, evidence.newest_id)
        self._networks.choose()
        root = Supervisor(ONE_FOR_ONE, intensity=5, period_s=60, children=self._children())
        try:
            async with open_system(root, name="volantd", rng=rng) as system, trio.open_nursery() as nursery:
                self.status.system = system
                nursery.start_soon(self._adopt)
                nursery.start_soon(self._choose_accelerator)
                nursery.start_soon(keep_drained, self.vms, self.store)
                nursery.start_soon(self._admission.watch_certificate)
                yield nursery
                nursery.cancel_scope.cancel()
        finally:
            self.logs.close()
            if self._member is not None:
                await self._member.aclose()

    async def drain(self) -> None:
        """Deletes an ephemeral daemon's VMs and ends all streams, before the tree stops."""
        if self.settings.ephemeral:
            left = await self.vms.delete_all(_EPHEMERAL_STOP_S)
            if left:
                _logger.error("these VMs could not be deleted: %s", ", ".join(left))
        self.stopping.set()
        self.store.events.close()
        self.store.audit.close()
        # If the tree stopped now, streams would break off instead of ending.
        with trio.move_on_after(_STREAMS_STOP_S):
            await self._served.wait()

    async def _serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        tls = self._admission.tls
        await serve(self.app, self._sockets, stopping=self.stopping, tls=tls, task_status=task_status)
        self._served.set()
        # The supervisor restarts a child that ends.
        await trio.sleep_forever()

    async def _hurry(self, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        """Stops at once on a second signal."""
        async for signum in signals:
            if signum == signal.SIGHUP:
                continue
            _logger.warning("stopping at once")
            scope.cancel()

    def _changed_access(self) -> None:
        self._networks.choose()
        self._networks.warn_of_refused()

    async def _adopt(self) -> None:
        began = trio.current_time()
        projection = self.store.projection
        await self.logs.recall([row.id for row in projection.rows()])
        # The rows again: the API already serves requests, and may have created a VM meanwhile.
        await self.logs.forget_unknown([row.id for row in projection.rows()])
        await self.vms.actors.adopt_all()
        await self._leftovers.find(self.vms)
        if self._member is None:
            await end_former_fleet(self.host, self.settings, self._notifier.scopes(), self.store)
        self.status.adoption_s = trio.current_time() - began
        self._networks.warn_of_refused()
        _logger.info("ready: %d VMs", len(self.store.projection))

    async def _choose_accelerator(self) -> None:
        """Probes now, so that the first VM does not wait, and `info` has the result."""
        choice = self.status.choice = await self.hypervisor.choice()
        _logger.info("guests run under %s: %s", choice.accelerator, choice.reason)

    async def _gave_up(self, failure: GaveUp) -> None:
        await self.vms.actors.gave_up(failure)


def _host(notifier: Notifier, settings: Settings) -> Host:
    scopes = notifier.scopes()
    groups = own_cgroups(f"volant-{instance_of(settings.state_dir)}") if scopes is None else None
    # Under systemd the weight of the slice sets the priority.
    lowers = settings.cpu_priority == "auto" and scopes is None and not raise_own()
    return Host(scopes, groups, parse_uids(settings.vm_uids), lowers=lowers)


def _sandbox(host: Host, settings: Settings) -> SandboxPlan | None:
    plan = sandbox_plan(host, settings)
    if plan is not None and plan.no_users is not None:
        _logger.warning("hypervisors have no users of their own: %s", plan.no_users)
    return plan


def _say(lines: Sequence[str]) -> None:
    """Prints lines on stdout, for programs that start the daemon with port 0. Uses one write, as the reader may stop
    after the first line."""
    with suppress(OSError):
        os.write(1, "".join(f"{line}\n" for line in lines).encode())
