"""Assembles the daemon from its settings, runs its supervisor tree, and stops it.

When it stops, streams end first, then the tree stops in reverse order: the API, the VMs' actors, the journal. VMs keep
running, unless the daemon is ephemeral.
"""

from __future__ import annotations

import logging
import os
import platform
import signal
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from functools import partial
from random import Random
from typing import Literal

import msgspec
import trio

from actors import ONE_FOR_ONE, ActorDown, AskTimeout, Child, DynamicSupervisor, GaveUp, Supervisor, System, open_system
from volant import __version__
from volant.api import create_app
from volant.host import Host, own_cgroups, raise_own
from volant.http import Access, ApiSettings, AsgiApp, serve
from volant.hypervisor import AcceleratorChoice, Hypervisor
from volant.hypervisor.qemu import QemuHypervisor
from volant.images import ArtifactCache
from volant.journal import Backups, Evidence, Journal, StillThere, Store, VmLogs, take_over
from volant.model import AUTO, BRIDGE, USER, Networking, Status, default_network, kind_of, parse_subnet
from volant.network import (
    HostNetwork,
    NetworkBackend,
    NetworkKeeper,
    Networks,
    NetworkSettings,
    Passt,
    passt_obstacle,
    passt_user,
)
from volant.operations import ApiDeps
from volant.templates import TemplateBuilder, Templates, TemplateStore, WarmPool, WarmPoolLimits
from volant.vm import (
    BootLimiter,
    BootSlots,
    Vms,
    clones_at_once,
    instance_of,
    keep_drained,
)

from ._directories import confine, log_dir, memory_dir, template_dir, vm_directories
from ._dump import dump_on_signal
from ._leftovers import Leftovers, evidence_of
from ._nameservers import nameservers_of_host
from ._protection import Protection
from ._sandbox import sandbox_plan
from ._settings import (
    RELOADED,
    Settings,
    SettingsError,
    check,
    check_service,
    memory_overcommit,
    origins_of,
    parse_uids,
    shown,
    split,
)
from ._sockets import address_of
from ._systemd import Notifier

_USER_REFUSED = (
    "the daemon accepts requests from addresses without an API key (api_allow_cidr), and a guest with this network has "
    "an address of the host, so it could control the daemon; set an API key"
)
_logger = logging.getLogger("volant.daemon")

_EPHEMERAL_STOP_S = 25.0
_RELOAD_S = 10.0
_JOURNAL_S = 60.0
_STREAMS_STOP_S = 3.0
"""Deadline for the API to close its streams; it has a shorter deadline of its own."""

Health = Literal["ok", "starting", "stopping", "degraded"]


Reload = Callable[[], tuple[Settings, list[str]]]
"""Loads the settings again. Returns them and the warnings to log."""


def _host(notifier: Notifier, settings: Settings) -> Host:
    scopes = notifier.scopes()
    groups = own_cgroups(f"volant-{instance_of(settings.state_dir)}") if scopes is None else None
    # Under systemd the weight of the slice sets the priority.
    lowers = settings.cpu_priority == "auto" and scopes is None and not raise_own()
    return Host(scopes, groups, parse_uids(settings.vm_uids), lowers=lowers)


def _warm_pool_limits(settings: Settings) -> WarmPoolLimits:
    return WarmPoolLimits(
        each=None if settings.standby == "auto" else settings.standby,
        most=2 * len(os.sched_getaffinity(0)),
        max_mb=settings.standby_max_mb,
        idle_s=settings.standby_idle_s,
    )


def _say(lines: Sequence[str]) -> None:
    """Prints lines on stdout, for programs that start the daemon with port 0. In one write, as the reader may stop
    after the first line."""
    with suppress(OSError):
        os.write(1, "".join(f"{line}\n" for line in lines).encode())


class Daemon:
    """Assembles the daemon, and answers what the API asks about it for `/system`."""

    def __init__(
        self,
        settings: Settings,
        sockets: list[socket.socket],
        reload: Reload | None = None,
        notifier: Notifier | None = None,
        *,
        host: Host | None = None,
        network: NetworkBackend | None = None,
    ) -> None:
        self.settings = settings
        self._sockets = sockets
        self._load_settings = reload
        self._notifier = notifier or Notifier(None)
        self._protection = self._check(settings)
        self._access = Access(self._api_settings(settings, self._protection))
        self.stopping = trio.Event()
        self._served = trio.Event()
        self._signalled = False
        self.adoption_s: float | None = None
        self.system: System | None = None
        self._choice: AcceleratorChoice | None = None
        self.host = host or _host(self._notifier, settings)
        self.started_at: datetime = self.host.clock.now()
        instance = instance_of(settings.state_dir)
        confine(self.host, settings)
        self.store = Store(
            self.host,
            settings.state_dir / "volant.db",
            networking=Networking(subnet=parse_subnet(settings.subnet), instance=instance),
        )
        self.logs = VmLogs(self.host, log_dir(settings))
        self._leftovers = Leftovers(self.host, settings, self.store)
        self._sandbox = sandbox_plan(self.host, settings)
        if self._sandbox is not None and self._sandbox.no_users is not None:
            _logger.warning("hypervisors have no users of their own: %s", self._sandbox.no_users)
        self.hypervisor: Hypervisor = QemuHypervisor(
            self.host,
            settings.cache_dir,
            accelerator=None if settings.accelerator == "auto" else settings.accelerator,
            sandbox=self._sandbox,
        )
        templates = TemplateStore(self.host, template_dir(settings), enabled=settings.templates == "auto")
        projection = self.store.projection
        processors = len(os.sched_getaffinity(0))
        slots = BootSlots(
            cold=BootLimiter(settings.max_boots or 2 * processors, projection),
            clones=BootLimiter(clones_at_once(processors), projection),
        )
        builder = TemplateBuilder(
            self.host,
            self.hypervisor,
            templates,
            instance=instance,
            runtime_dir=settings.runtime_dir,
            memory_dir=memory_dir(settings),
            agent_timeout_s=settings.agent_timeout_s,
        )
        warm_pool = WarmPool(
            self.host,
            self.hypervisor,
            templates,
            projection,
            _warm_pool_limits(settings),
            instance=instance,
            runtime_dir=settings.runtime_dir,
            memory_dir=memory_dir(settings),
            quiet=lambda: not slots.in_use,
        )
        max_age = timedelta(seconds=settings.templates_max_age_s)
        self._templates = Child(
            "templates",
            partial(
                Templates,
                self.host,
                templates,
                builder,
                warm_pool,
                slots.cold,
                projection,
                max_bytes=settings.templates_max_mb * 2**20,
                max_age=max_age,
            ),
            shutdown_s=10,
        )
        self._journal = Child("journal", partial(Journal, self.store), shutdown_s=10)
        passt = Passt(self.host, settings.runtime_dir, instance, passt_user(parse_uids(settings.vm_uids)))
        self._networks = Networks(
            network or HostNetwork(self.host),
            NetworkSettings(instance=instance, subnet=parse_subnet(settings.subnet), bridge=settings.bridge),
            self.store.projection.rows,
            passt,
        )
        self._network = Child("network", partial(NetworkKeeper, self._networks), shutdown_s=30)
        self._supervisor = DynamicSupervisor(intensity=3, period_s=60, gave_up=self._gave_up)
        self.vms = Vms(
            host=self.host,
            hypervisor=self.hypervisor,
            journal=self._journal.ref,
            store=self.store,
            logs=self.logs,
            artifacts=ArtifactCache(
                settings.cache_dir,
                settings.state_dir,
                timeout_s=settings.artifact_timeout_s,
                max_mb=settings.artifact_max_mb,
                origins=origins_of(settings),
            ),
            templates=templates,
            builder=self._templates.ref,
            warm_pool=warm_pool,
            slots=slots,
            passt=passt,
            network=self._network.ref,
            supervisor=self._supervisor,
            settings=msgspec.structs.replace(
                vm_directories(settings),
                kernel=settings.kernel,
                initramfs=settings.initramfs,
                max_vms=settings.max_vms,
                memory_overcommit=memory_overcommit(settings),
                return_memory=settings.return_memory == "on",
                image_timeout_s=settings.image_timeout_s,
                agent_timeout_s=settings.agent_timeout_s,
                nameservers=tuple(split(settings.nameservers)) or nameservers_of_host(),
            ),
            instance=instance,
        )
        self.backups = Backups(self.host, self.store, self._journal.ref, self._evidence)
        self.app = create_app(
            ApiDeps(
                vms=self.vms,
                journal=self._journal.ref,
                store=self.store,
                logs=self.logs,
                backups=self.backups,
                host=self.host,
                system=self,
                access=self._access,
            )
        )

    @property
    def restarts(self) -> bool:
        """Whether the daemon stops for a restored database, and another daemon must follow."""
        return self.store.replaced.is_set() and not self._signalled

    async def run(self, signals: AsyncIterator[int], *, first: bool = True) -> list[str]:
        """Runs until a signal or a restored database, then stops. Returns the names of the VMs that exist then.

        :param first: whether it is the first daemon of this process
        """
        async with self.running() as nursery:
            if first:
                _say([f"volantd: listening on {address_of(sock)}" for sock in self._sockets])
            nursery.start_soon(
                self._notifier.keep, lambda: self.adoption_s is not None, self._find_problem, self._summary
            )
            nursery.start_soon(dump_on_signal)
            await self._until_stopped(signals)
            if self.restarts:
                _logger.info("restarting with the restored database")
            else:
                self._notifier.stopping(
                    "Stopping, VMs too" if self.settings.ephemeral else "Stopping; VMs keep running"
                )
            nursery.start_soon(self._hurry, signals, nursery.cancel_scope)
            await self.drain()
        _logger.info("stopped")
        return [row.name for row in self.store.projection.rows()]

    async def _until_stopped(self, signals: AsyncIterator[int]) -> None:
        async with trio.open_nursery() as nursery:

            async def replaced() -> None:
                await self.store.replaced.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(replaced)
            async for signum in signals:
                if signum == signal.SIGHUP:
                    with self._notifier.reloading():
                        await self._reload()
                    continue
                self._signalled = True
                _logger.info("stopping: %s", signal.Signals(signum).name)
                nursery.cancel_scope.cancel()
                break

    @asynccontextmanager
    async def running(self, rng: Random | None = None) -> AsyncIterator[trio.Nursery]:
        """Runs the tree for the length of the block. Adopts VMs in the nursery that it yields.

        :param rng: the source of randomness in the tree
        :raises OSError: when a restored database can't replace the old one.
        """
        aside = await self.host.threads.run(take_over, self.host, self.store.path)
        if aside is not None:
            _logger.warning("using the restored database; the previous one is %s", aside)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._find_obstacles)
            # A database that was lost or replaced by hand does not know which ids are used.
            self.store.ids_taken = (await self._evidence()).newest_id
        self._choose_network()
        root = Supervisor(
            ONE_FOR_ONE,
            intensity=5,
            period_s=60,
            children=[
                self._journal,
                self._network,
                Child("logs", self.logs.keep),
                self._templates,
                Child("snapshots", self.vms.copies.keep),
                Child("vms", self._supervisor),
                Child("api", partial(self._serve, self.app), shutdown_s=10),
            ],
        )
        try:
            async with open_system(root, name="volantd", rng=rng) as system, trio.open_nursery() as nursery:
                self.system = system
                nursery.start_soon(self._adopt)
                nursery.start_soon(self._choose_accelerator)
                nursery.start_soon(keep_drained, self.vms, self.store)
                yield nursery
                nursery.cancel_scope.cancel()
        finally:
            self.logs.close()

    async def drain(self) -> None:
        """Deletes an ephemeral daemon's VMs and ends all streams, before the tree stops."""
        if self.settings.ephemeral and not self.restarts:
            left = await self.vms.delete_all(_EPHEMERAL_STOP_S)
            if left:
                _logger.error("these VMs could not be deleted: %s", ", ".join(left))
        self.stopping.set()
        self.store.events.close()
        # If the tree stopped now, streams would break off instead of ending.
        with trio.move_on_after(_STREAMS_STOP_S):
            await self._served.wait()

    async def _serve(self, app: AsgiApp, *, task_status: trio.TaskStatus[None]) -> None:
        await serve(app, self._sockets, stopping=self.stopping, task_status=task_status)
        self._served.set()
        # The supervisor restarts a child that ends.
        await trio.sleep_forever()

    async def _hurry(self, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        """Stops at once on a second signal."""
        async for signum in signals:
            if signum == signal.SIGHUP:
                continue
            if self.restarts:
                self._signalled = True
                self._notifier.stopping("Stopping; VMs keep running")
                continue
            _logger.warning("stopping at once")
            scope.cancel()

    async def _find_obstacles(self) -> None:
        """Notes which networks this host can't give to VMs. Two of the checks run a program, side by side."""
        found = {USER: passt_obstacle()}
        unfiltered = None

        async def check_filter() -> None:
            nonlocal unfiltered
            unfiltered = await self._networks.passt_filter.obstacle()

        async with trio.open_nursery() as nursery:
            if found[USER] is None:
                nursery.start_soon(check_filter)
            found[BRIDGE] = await self._networks.obstacle()
        self.store.networking = msgspec.structs.replace(
            self.store.networking,
            obstacles={kind: obstacle for kind, obstacle in found.items() if obstacle is not None},
            user_unfiltered=unfiltered or "",
        )

    def _choose_network(self) -> None:
        """Decides which networks VMs may have, by what this host supports and by who may control the daemon."""
        protection, networking = self._protection, self.store.networking
        refused = _USER_REFUSED if protection.allow_cidr and not protection.keys else ""
        obstacles = {**networking.obstacles, USER: refused} if refused else networking.obstacles
        default = default_network(self.settings.network, obstacles, is_root=os.geteuid() == 0)
        if default != networking.default and self.settings.network == AUTO:
            level = logging.WARNING if default.fallback else logging.INFO
            text = "the default network of VMs is %s: %s"
            _logger.log(level, text, default.network, default.reason)
        self.store.networking = msgspec.structs.replace(networking, default=default, user_refused=refused)

    def _warn_of_refused_networks(self) -> None:
        """Logs the VMs that have a network that is refused by now. The operator decides whether they keep it."""
        refused = self.store.networking.user_refused
        behind = [row.name for row in self.store.projection.rows() if kind_of(row.network) == USER]
        if refused and behind:
            more = f" and {len(behind) - 5} more" if len(behind) > 5 else ""
            _logger.warning("these VMs have the network 'user': %s%s; %s", ", ".join(behind[:5]), more, refused)

    async def _reload(self) -> None:
        """Applies reloaded keys, networks, hosts and origins: all of them, or none when one is invalid."""
        if self._load_settings is None:
            return
        try:
            with trio.fail_after(_RELOAD_S):
                settings, warnings = await trio.to_thread.run_sync(self._load_settings, abandon_on_cancel=True)
                taken = msgspec.structs.replace(self.settings, **{name: getattr(settings, name) for name in RELOADED})
                # The daemon still listens on the old addresses.
                protection = await trio.to_thread.run_sync(self._check, taken, abandon_on_cancel=True)
        except (SettingsError, OSError, trio.TooSlowError) as error:
            _logger.error(
                "the old settings stay, as the new ones can't be loaded: %s", error or "reading took too long"
            )
            return
        for warning in warnings:
            _logger.warning("%s", warning)
        self._access.replace(self._api_settings(taken, protection))
        self.settings = taken
        self._protection = protection
        self._choose_network()
        self._warn_of_refused_networks()
        _logger.info("reloaded keys, networks, hosts and origins")
        left = [name for name in Settings.__struct_fields__ if getattr(settings, name) != getattr(taken, name)]
        if left:
            _logger.warning("restart the daemon to apply these changed settings: %s", ", ".join(left))

    def _check(self, settings: Settings) -> Protection:
        """Returns the access control. :raises SettingsError: when the daemon must not run with these settings."""
        protected = check(settings)
        if self._notifier.is_there and os.geteuid() == 0:
            check_service(settings, protected)
        return protected

    def _api_settings(self, settings: Settings, protection: Protection) -> ApiSettings:
        return ApiSettings(
            addresses=tuple(address_of(sock) for sock in self._sockets),
            allowed_hosts=tuple(split(settings.allowed_hosts)),
            cors_origins=tuple(split(settings.cors_origins)),
            api_keys=tuple(key.reveal() for key in protection.keys),
            allow_cidr=protection.allow_cidr,
            trusted_proxies=protection.trusted_proxies,
        )

    async def _adopt(self) -> None:
        began = trio.current_time()
        projection = self.store.projection
        await self.logs.recall([row.id for row in projection.rows()])
        # The rows again: the API already serves requests, and may have created a VM meanwhile.
        await self.logs.forget_unknown([row.id for row in projection.rows()])
        await self.vms.actors.adopt_all()
        await self._leftovers.find(self.vms)
        self.adoption_s = trio.current_time() - began
        self._warn_of_refused_networks()
        _logger.info("ready: %d VMs", len(self.store.projection))

    async def _evidence(self) -> Evidence:
        return await evidence_of(self.host, self.settings, self.logs)

    async def _choose_accelerator(self) -> None:
        """Probes now, so that the first VM need not wait, and `info` knows the result."""
        self._choice = await self.hypervisor.choice()
        _logger.info("guests run under %s: %s", self._choice.accelerator, self._choice.reason)

    async def _find_problem(self) -> str | None:
        """Returns why the daemon does not work, or None. Asks its parts through the event loop."""
        if self.system is not None and not self.system.all_running():
            return "a part of the daemon is down and can't be restarted"
        try:
            # The caller has a shorter deadline.
            await self._journal.ref.ask(StillThere(), timeout_s=_JOURNAL_S)
        except (ActorDown, AskTimeout) as error:
            return f"the journal does not answer: {error}"
        return None

    def _summary(self) -> str:
        rows = self.store.projection.rows()
        running = sum(row.status is Status.RUNNING for row in rows)
        said = f"{len(rows)} VMs, {running} running" if rows else "no VMs"
        if self.store.trouble is not None:
            said += f"; {self.store.trouble}"
        return said if self.store.projection.drain is None else f"{said}, draining"

    async def _gave_up(self, failure: GaveUp) -> None:
        await self.vms.actors.gave_up(failure)

    # For the API

    def health(self) -> Health:
        """Returns `ok` when the tree is complete, changes can be made and the database is intact. A failed VM or a
        missing hypervisor does not count."""
        if self.stopping.is_set():
            return "stopping"
        if self.adoption_s is None or self.system is None:
            return "starting"
        store = self.store
        return "ok" if self.system.all_running() and store.trouble is None and store.damage is None else "degraded"

    def tree(self) -> Mapping[str, object]:
        """Returns the supervisor tree, ready for JSON."""
        return self.system.tree() if self.system is not None else {}

    def info(self) -> Mapping[str, object]:
        """Returns versions, addresses, directories and settings, ready for JSON."""
        networking = self.store.networking
        obstacles = dict(networking.obstacles)
        if networking.user_refused:
            obstacles[USER] = networking.user_refused
        obstacles.setdefault(USER, networking.reason_for("available"))
        return {
            "version": __version__,
            "addresses": [address_of(sock) for sock in self._sockets],
            "python": platform.python_version(),
            "kernel": platform.release(),
            "hypervisor": self.hypervisor.name,
            "hypervisor_version": self._choice.version if self._choice else None,
            "accelerator": self._choice.accelerator if self._choice else None,
            "accelerator_reason": self._choice.reason if self._choice else "the probe has not finished",
            "networks": {kind: obstacles.get(kind, "available") for kind in (BRIDGE, USER)},
            "sandbox": None if self._sandbox is None else self._sandbox.view(),
            "state_dir": str(self.settings.state_dir),
            "runtime_dir": str(self.settings.runtime_dir),
            "cache_dir": str(self.settings.cache_dir),
            "settings": shown(self.settings),
            "journal": {"trouble": self.store.trouble, "lost": self.store.lost, "damage": self.store.damage},
            "event_epoch": self.store.projection.last_event.epoch,
            "orphans": self._leftovers.view(),
            "started_at": self.started_at,
        }
