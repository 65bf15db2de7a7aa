"""From settings to a running tree, and back to nothing.

The order matters at both ends. Directories are claimed and sockets bound before the tree begins, so that a daemon that
can't have them ends at once and says so, and no child that restarts loses a client's connection. At the end streams
are told first, then the tree stops in reverse: the API, the VMs' actors, the journal. VMs go on running, unless the
daemon is ephemeral.
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

import apsw
import msgspec
import trio
from quart_trio import QuartTrio

from actors import ONE_FOR_ONE, ActorDown, AskTimeout, Child, DynamicSupervisor, GaveUp, Supervisor, System, open_system
from volant import __version__
from volant.api import create_app
from volant.host import Host, ProcessGone, own_cgroups, raise_own
from volant.http import Access, ApiSettings, serve
from volant.hypervisor import AcceleratorChoice, Hypervisor
from volant.hypervisor.qemu import QemuHypervisor
from volant.images import ArtifactCache, make_private
from volant.journal import Backups, DatabaseRefused, Evidence, Journal, Running, StillThere, Store, VmLogs, take_over
from volant.model import AUTO, BRIDGE, USER, Networking, ProcessIdentity, Status, default_network, kind_of, parse_subnet
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
from volant.templates import BuildDoors, Templates, TemplateStore, WarmPool, WarmPoolLimits
from volant.vm import (
    CLONES_AT_ONCE,
    BootLimiter,
    Checkpoints,
    VmDoors,
    Vms,
    VmSettings,
    instance_of,
    keep_drained,
    processes_of_vms,
)

from ._directories import (
    DirectoryError,
    claimed,
    confine,
    disk_dir,
    log_dir,
    memory_dir,
    remove,
    snapshot_dir,
    template_dir,
)
from ._dump import dump_on_signal
from ._nameservers import nameservers_of_host
from ._protection import Protection
from ._sandbox import sandbox_plan
from ._settings import (
    DEFAULT_ADDRESS,
    RELOADED,
    Settings,
    SettingsError,
    check,
    check_service,
    origins_of,
    parse_uids,
    shown,
    split,
)
from ._sockets import ListenError, address_of, listening, setting_of
from ._systemd import Notifier

_USER_REFUSED = (
    "the daemon lets addresses in without a key (api_allow_cidr), and a guest with this network has an address of the "
    "host's, so it could command the daemon; set an API key"
)
_logger = logging.getLogger("volant.daemon")

_EPHEMERAL_STOP_S = 25.0
_RELOAD_S = 10.0
_AILMENT_S = 60.0
_STREAMS_STOP_S = 3.0
"""How long the API may take to see its connections off; it has a shorter deadline of its own."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LATE_SIGNAL_S = 0.01

Health = Literal["ok", "starting", "stopping", "degraded"]


class DaemonError(Exception):
    """The daemon can't run. The text is for the operator."""


Reread = Callable[[], tuple[Settings, list[str]]]
"""Loads the settings once more, from where they came, with what to warn of."""


async def run(
    settings: Settings,
    reread: Reread | None = None,
    *,
    handed_in: Sequence[socket.socket] = (),
    notifier: Notifier | None = None,
) -> None:
    """Run until SIGTERM or SIGINT; on SIGHUP take from `reread` what can be taken.

    `handed_in`: sockets to listen on, whatever the settings say; `notifier`: who started us and wants to be told.

    :raises DaemonError: it can't run.
    :raises SettingsError: a key file has become something else since the settings were loaded.
    """
    notifier = notifier or Notifier(None)
    if handed_in:
        _tell_of_addresses(handed_in, settings)
        settings = _listening_on(handed_in, settings)
        if reread is not None:
            reread = partial(_reread_but_addresses, reread, handed_in)
    try:
        # Signals are held to the very end: one more that comes while the state is removed must not leave half of it.
        with (
            claimed(settings),
            listening(settings, handed_in) as sockets,
            trio.open_signal_receiver(*_SIGNALS) as signals,
        ):
            make_private(settings.cache_dir)
            daemon = Daemon(settings, sockets, reread, notifier)
            left = await daemon.run(signals)
            while daemon.begins_anew:
                daemon = Daemon(daemon.settings, sockets, reread, notifier)
                left = await daemon.run(signals, first=False)
            if settings.ephemeral and left:
                _logger.error("the state is kept for the VMs that are left: %s", ", ".join(left))
            elif settings.ephemeral:
                remove(settings)
            with trio.move_on_after(_LATE_SIGNAL_S):
                async for _ in signals:
                    pass
    except (DirectoryError, ListenError, DatabaseRefused) as error:
        raise DaemonError(str(error)) from error
    except apsw.Error as error:
        raise DaemonError(f"the database in {settings.state_dir} can't be opened: {error}") from error


def _tell_of_addresses(sockets: Sequence[socket.socket], settings: Settings) -> None:
    """Addresses that somebody has meant and that are not listened on."""
    given = [setting_of(sock) for sock in sockets]
    unused = [address for address in split(settings.api_listen_addr) if address not in (*given, DEFAULT_ADDRESS)]
    if unused:
        _logger.warning(
            "api_listen_addr %s does nothing, as systemd has bound %s; change it with `systemctl edit volantd.socket`",
            ", ".join(unused),
            ", ".join(given),
        )


def _listening_on(sockets: Sequence[socket.socket], settings: Settings) -> Settings:
    return msgspec.structs.replace(settings, api_listen_addr=",".join(setting_of(sock) for sock in sockets))


def _reread_but_addresses(reread: Reread, sockets: Sequence[socket.socket]) -> tuple[Settings, list[str]]:
    settings, warnings = reread()
    return _listening_on(sockets, settings), warnings


def _host(notifier: Notifier, settings: Settings) -> Host:
    scopes = notifier.scopes()
    groups = own_cgroups(f"volant-{instance_of(settings.state_dir)}") if scopes is None else None
    # Under systemd the weight of its slice says so.
    lowers = settings.cpu_priority == "auto" and scopes is None and not raise_own()
    return Host(scopes, groups, parse_uids(settings.vm_uids), lowers=lowers)


def _say(lines: Sequence[str]) -> None:
    """On stdout, as whoever started us with port 0 has to read it. In one piece, as they may leave after a line."""
    with suppress(OSError):
        os.write(1, "".join(f"{line}\n" for line in lines).encode())


async def evidence_of(host: Host, settings: Settings, logs: VmLogs) -> Evidence:
    """What there is of VMs on the host. :raises OSError: it can't be looked for."""
    await logs.prepare()
    instance = instance_of(settings.state_dir)
    running = {}
    for each in await processes_of_vms(host, instance):
        console = settings.runtime_dir / "vms" / str(each.vm_id) / "console.sock"
        running[each.vm_id] = Running(each.boot, each.identity, str(console))
    disks = await host.threads.run(host.files.names, disk_dir(settings))
    ids = [int(name.partition("-")[0]) for name in disks if name.partition("-")[0].isdecimal()]
    return Evidence(max([0, *running, *logs.ids(), *ids]), running)


class Daemon:
    """Assembles the daemon, and answers what the API asks about it for `/system`."""

    def __init__(
        self,
        settings: Settings,
        sockets: list[socket.socket],
        reread: Reread | None = None,
        notifier: Notifier | None = None,
        *,
        host: Host | None = None,
        network: NetworkBackend | None = None,
    ) -> None:
        self.settings = settings
        self._sockets = sockets
        self._reread = reread
        self._notifier = notifier or Notifier(None)
        self._protection = self._check(settings)
        self._access = Access(self._api_settings(settings, self._protection))
        self.stopping = trio.Event()
        self._served = trio.Event()
        self._told_to_stop = False
        self.adoption_s: float | None = None
        self.system: System | None = None
        self._orphans: list[ProcessIdentity] = []
        self._stray_disks: list[str] = []
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
        boot_slots = BootLimiter(settings.max_boots or 2 * len(os.sched_getaffinity(0)), self.store.projection)
        builds = BuildDoors(
            host=self.host,
            hypervisor=self.hypervisor,
            store=templates,
            boot_slots=boot_slots,
            projection=self.store.projection,
            instance=instance,
            runtime_dir=settings.runtime_dir,
            memory_dir=memory_dir(settings),
            agent_timeout_s=settings.agent_timeout_s,
        )
        clone_slots = BootLimiter(CLONES_AT_ONCE, self.store.projection)
        warm_pool = WarmPool(
            builds,
            WarmPoolLimits(each=settings.standby, max_mb=settings.standby_max_mb, idle_s=settings.standby_idle_s),
            quiet=lambda: not (boot_slots.in_use or clone_slots.in_use),
        )
        max_age = timedelta(seconds=settings.templates_max_age_s)
        self._templates = Child(
            "templates",
            partial(Templates, builds, warm_pool, max_bytes=settings.templates_max_mb * 2**20, max_age=max_age),
            shutdown_s=10,
        )
        self._journal = Child("journal", partial(Journal, self.store), shutdown_s=10)
        uid = passt_user(parse_uids(settings.vm_uids))
        self._networks = Networks(
            network or HostNetwork(self.host),
            NetworkSettings(instance=instance, subnet=parse_subnet(settings.subnet), bridge=settings.bridge),
            self.store.projection.rows,
            Passt(self.host, settings.runtime_dir, instance, uid),
        )
        self._network = Child("network", partial(NetworkKeeper, self._networks), shutdown_s=30)
        self._checkpoints = Checkpoints(
            self.host,
            self.store,
            self._journal.ref,
            self.hypervisor,
            memory_dir=memory_dir(settings),
            snapshot_dir=snapshot_dir(settings),
        )
        self._supervisor = DynamicSupervisor(intensity=3, period_s=60, gave_up=self._gave_up)
        self.vms = Vms(
            VmDoors(
                host=self.host,
                journal=self._journal.ref,
                store=self.store,
                logs=self.logs,
                hypervisor=self.hypervisor,
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
                checkpoints=self._checkpoints,
                settings=VmSettings(
                    runtime_dir=settings.runtime_dir,
                    cache_dir=settings.cache_dir,
                    memory_dir=memory_dir(settings),
                    disk_dir=disk_dir(settings),
                    template_dir=template_dir(settings),
                    snapshot_dir=snapshot_dir(settings),
                    kernel=settings.kernel,
                    initramfs=settings.initramfs,
                    max_vms=settings.max_vms,
                    return_memory=settings.return_memory == "on",
                    image_timeout_s=settings.image_timeout_s,
                    agent_timeout_s=settings.agent_timeout_s,
                    passt_user=uid,
                    nameservers=tuple(split(settings.nameservers)) or nameservers_of_host(),
                ),
                instance=instance,
                boot_slots=boot_slots,
                clone_slots=clone_slots,
                network=self._network.ref,
            ),
            self._supervisor,
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
    def begins_anew(self) -> bool:
        """Whether it has ended because another database is to be taken, and a daemon with that shall follow."""
        return self.store.replaced.is_set() and not self._told_to_stop

    async def run(self, signals: AsyncIterator[int], *, first: bool = True) -> list[str]:
        """Run until a signal, or until another database is to be taken, then stop; the names of the VMs that there are
        then. `first`: nobody ran before it in this process."""
        async with self.standing() as nursery:
            if first:
                _say([f"volantd: listening on {address_of(sock)}" for sock in self._sockets])
            nursery.start_soon(self._notifier.keep, lambda: self.adoption_s is not None, self._ailment, self._summary)
            nursery.start_soon(dump_on_signal)
            await self._until_over(signals)
            if self.begins_anew:
                _logger.info("the tree ends and begins anew with the restored database")
            else:
                self._notifier.stopping("Stopping, VMs too" if self.settings.ephemeral else "Stopping; VMs go on")
            nursery.start_soon(self._hurry, signals, nursery.cancel_scope)
            await self.see_off()
        _logger.info("stopped")
        return [row.name for row in self.store.projection.rows()]

    async def _until_over(self, signals: AsyncIterator[int]) -> None:
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
                self._told_to_stop = True
                _logger.info("stopping: %s", signal.Signals(signum).name)
                nursery.cancel_scope.cancel()
                break

    @asynccontextmanager
    async def standing(self, rng: Random | None = None) -> AsyncIterator[trio.Nursery]:
        """The tree stands for the length of a block, in whose nursery its VMs are taken up; `health` tells how it is.

        `rng` decides what is left to chance in the tree.

        :raises OSError: a restored database waits, and can't be put in its place.
        """
        aside = await self.host.threads.run(take_over, self.host, self.store.path)
        if aside is not None:
            _logger.warning("a restored database is taken; the one before it lies in %s", aside)
        # A database that was lost, or put back by hand, does not know which ids are used.
        self.store.ids_taken = (await self._evidence()).newest_id
        found = {BRIDGE: await self._networks.obstacle(), USER: passt_obstacle()}
        obstacles = {kind: obstacle for kind, obstacle in found.items() if obstacle is not None}
        unfiltered = await self._networks.passt_filter.obstacle() if USER not in obstacles else None
        self.store.networking = msgspec.structs.replace(
            self.store.networking, obstacles=obstacles, user_unfiltered=unfiltered or ""
        )
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
                Child("snapshots", self._checkpoints.keep),
                Child("vms", self._supervisor),
                Child("api", partial(self._serve, self.app), shutdown_s=10),
            ],
        )
        try:
            async with open_system(root, name="volantd", rng=rng) as system, trio.open_nursery() as nursery:
                self.system = system
                nursery.start_soon(self._adopt)
                nursery.start_soon(self._choose_accelerator)
                nursery.start_soon(keep_drained, self.vms)
                yield nursery
                nursery.cancel_scope.cancel()
        finally:
            self.logs.close()

    async def see_off(self) -> None:
        """Before the tree stops: an ephemeral daemon's VMs go, and every stream is told and ends."""
        if self.settings.ephemeral and not self.begins_anew:
            left = await self.vms.delete_all(_EPHEMERAL_STOP_S)
            if left:
                _logger.error("these VMs could not be deleted: %s", ", ".join(left))
        self.stopping.set()
        self.store.events.close()
        # Cancelled now, the tree would cut streams off in the middle of being told.
        with trio.move_on_after(_STREAMS_STOP_S):
            await self._served.wait()

    async def _serve(self, app: QuartTrio, *, task_status: trio.TaskStatus[None]) -> None:
        await serve(app, self._sockets, stopping=self.stopping, task_status=task_status)
        self._served.set()
        # A child that ends is one that its supervisor starts again.
        await trio.sleep_forever()

    async def _hurry(self, signals: AsyncIterator[int], scope: trio.CancelScope) -> None:
        """A second signal ends the patience with VMs."""
        async for signum in signals:
            if signum == signal.SIGHUP:
                continue
            if self.begins_anew:
                self._told_to_stop = True
                self._notifier.stopping("Stopping; VMs go on")
                continue
            _logger.warning("stopping at once")
            scope.cancel()

    def _choose_network(self) -> None:
        """Decide which networks VMs may have, by what this host can do and by who may command the daemon."""
        protection, networking = self._protection, self.store.networking
        refused = _USER_REFUSED if protection.allow_cidr and not protection.keys else ""
        obstacles = {**networking.obstacles, USER: refused} if refused else networking.obstacles
        default = default_network(self.settings.network, obstacles, is_root=os.geteuid() == 0)
        if default != networking.default and self.settings.network == AUTO:
            level = logging.WARNING if default.fallback else logging.INFO
            text = "VMs have the network %s where they name none: %s"
            _logger.log(level, text, default.network, default.reason)
        self.store.networking = msgspec.structs.replace(networking, default=default, user_refused=refused)

    def _warn_of_commanders(self) -> None:
        """Name the VMs that have a refused network from before; to take it from them is the operator's to decide."""
        refused = self.store.networking.user_refused
        behind = [row.name for row in self.store.projection.rows() if kind_of(row.network) == USER]
        if refused and behind:
            more = f" and {len(behind) - 5} more" if len(behind) > 5 else ""
            _logger.warning("these VMs have the network 'user': %s%s; %s", ", ".join(behind[:5]), more, refused)

    async def _reload(self) -> None:
        """Take keys, networks, hosts and origins anew: all of them, or none when something does not fit."""
        if self._reread is None:
            return
        try:
            with trio.fail_after(_RELOAD_S):
                settings, warnings = await trio.to_thread.run_sync(self._reread, abandon_on_cancel=True)
                taken = msgspec.structs.replace(self.settings, **{name: getattr(settings, name) for name in RELOADED})
                # With the addresses that are listened on, which may not be those of the new settings.
                protection = await trio.to_thread.run_sync(self._check, taken, abandon_on_cancel=True)
        except (SettingsError, OSError, trio.TooSlowError) as error:
            _logger.error("nothing is reloaded, the old settings go on: %s", error or "reading them took too long")
            return
        for warning in warnings:
            _logger.warning("%s", warning)
        self._access.replace(self._api_settings(taken, protection))
        self.settings = taken
        self._protection = protection
        self._choose_network()
        self._warn_of_commanders()
        _logger.info("reloaded keys, networks, hosts and origins")
        left = [name for name in Settings.__struct_fields__ if getattr(settings, name) != getattr(taken, name)]
        if left:
            _logger.warning("these settings have changed and wait for a restart: %s", ", ".join(left))

    def _check(self, settings: Settings) -> Protection:
        """What protects the daemon, if it may run with these settings. :raises SettingsError: it may not."""
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
        # Asked anew: the API takes requests already, and one that was made meanwhile is known.
        await self.logs.forget_unknown([row.id for row in projection.rows()])
        await self.vms.adopt_all()
        await self._list_orphans()
        self.adoption_s = trio.current_time() - began
        self._warn_of_commanders()
        _logger.info("ready: %d VMs", len(self.store.projection))

    async def _evidence(self) -> Evidence:
        return await evidence_of(self.host, self.settings, self.logs)

    async def _list_orphans(self) -> None:
        """Processes and disks that are ours and belong to no row are named, never removed on a guess: the database may
        have been put back from a copy."""
        self._orphans = [orphan.identity for orphan in await self.vms.orphans()]
        for identity in self._orphans:
            _logger.warning(
                "process %d is a hypervisor of ours that no VM owns; `volar vms adopt %s` makes it one, "
                "`volar vms kill` ends it",
                identity.pid,
                identity.tag,
            )
        layers = {row.layer for row in self.store.projection.rows()}
        directory = disk_dir(self.settings)
        for name in await self.host.threads.run(self.host.files.names, directory):
            if name not in layers:
                _logger.warning("%s is the disk of a VM that does not exist", directory / name)
                self._stray_disks.append(name)

    def _ownerless(self) -> list[dict[str, object]]:
        """What of that is so still."""
        rows = self.store.projection.rows()
        tags, layers = {row.tag for row in rows}, {row.layer for row in rows}
        found: list[dict[str, object]] = []
        for identity in self._orphans:
            with suppress(ProcessGone), self.host.processes.open(identity) as process:
                if identity.tag not in tags and not process.exited:
                    found.append({"pid": identity.pid, "mark": identity.tag})
        found += [{"disk": str(disk_dir(self.settings) / name)} for name in self._stray_disks if name not in layers]
        return found

    async def _choose_accelerator(self) -> None:
        """Try it now, so that the first VM does not wait for it, and `info` can tell."""
        self._choice = await self.hypervisor.choice()
        _logger.info("guests run under %s: %s", self._choice.accelerator, self._choice.reason)

    async def _ailment(self) -> str | None:
        """What ails the daemon, None when it is well: asked of the parts themselves, through the event loop."""
        if self.system is not None and not self.system.whole():
            return "a part of the daemon is down and does not come up again"
        try:
            # Whoever asks has a shorter patience.
            await self._journal.ref.ask(StillThere(), timeout_s=_AILMENT_S)
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

    async def _gave_up(self, told: GaveUp) -> None:
        await self.vms.gave_up(told)

    # What the API shows of the daemon

    def health(self) -> Health:
        """`ok` when the tree is whole, changes can be made and the database is sound; a VM's failure or a missing
        hypervisor is nothing of that."""
        if self.stopping.is_set():
            return "stopping"
        if self.adoption_s is None or self.system is None:
            return "starting"
        store = self.store
        return "ok" if self.system.whole() and store.trouble is None and store.damage is None else "degraded"

    def tree(self) -> Mapping[str, object]:
        """The supervisor tree, ready for JSON."""
        return self.system.tree() if self.system is not None else {}

    def info(self) -> Mapping[str, object]:
        """Addresses, versions, directories, accelerator and why; ready for JSON."""
        networking = self.store.networking
        obstacles = dict(networking.obstacles)
        if networking.user_refused:
            obstacles[USER] = networking.user_refused
        obstacles.setdefault(USER, networking.reason_for("can be had"))
        return {
            "version": __version__,
            "addresses": [address_of(sock) for sock in self._sockets],
            "python": platform.python_version(),
            "kernel": platform.release(),
            "hypervisor": self.hypervisor.name,
            "hypervisor_version": self._choice.version if self._choice else None,
            "accelerator": self._choice.accelerator if self._choice else None,
            "accelerator_reason": self._choice.reason if self._choice else "not known yet",
            "networks": {kind: obstacles.get(kind, "can be had") for kind in (BRIDGE, USER)},
            "sandbox": None if self._sandbox is None else self._sandbox.view(),
            "state_dir": str(self.settings.state_dir),
            "runtime_dir": str(self.settings.runtime_dir),
            "cache_dir": str(self.settings.cache_dir),
            "settings": shown(self.settings),
            "journal": {"trouble": self.store.trouble, "lost": self.store.lost, "damage": self.store.damage},
            "event_epoch": self.store.projection.last_event.epoch,
            "orphans": self._ownerless(),
            "started_at": self.started_at,
        }
