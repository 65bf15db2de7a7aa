"""The daemon's session with one guest's agent: assigns the identity, configures, and keeps the guest up to date.

It lasts as long as the hypervisor's process. Four tasks run in it: the workload's output and state are carried to the
VM, clock and hosts entries to the guest.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress

import msgspec
import trio

from volant.channel import AgentProtocolError, AgentUnreachable, ParkedLink, VirtioSerial, Vsock
from volant.concurrency import Backoff
from volant.host import Host
from volant.hypervisor import MachineSpec
from volant.logs import VmLog
from volant.model import Seen, WorkloadChanged, WorkloadView
from volant.model.agent import (
    DAEMON_IDENTITY,
    DAEMON_MANIFEST,
    DAEMON_ROOT,
    DAEMON_SECRETS,
    DAEMON_VOLUMES,
    DAEMON_WORKLOAD,
    IDENTITY_AS_IT_IS_SINCE,
    IDENTITY_NETWORK_SINCE,
    IDENTITY_WORKLOAD_SINCE,
    PROTOCOL_MIN,
    SECRETS_SINCE,
    VOLUMES_SINCE,
)

from ._clock import GuestClock
from ._connection import AgentConnection, WorkloadNotHealthy, detail_of
from ._output import pump_output
from ._peers import HOSTS_AT_ONCE, HostsEntries, Peers
from ._secrets import GuestSecrets, SecretsFailed
from ._workload import ReportLimit, follow_workload

_logger = logging.getLogger("volant.vm")

_RETRY_S, _RETRY_MAX_S = 0.1, 10.0
_ROOT_S = 20.0
"""The deadline for the root filesystem. The agent waits 15 s for the guest's setup before it answers."""
_VOLUMES_S = 60.0
"""The deadline for volumes. A journal may need a replay."""
_SECRETS_S = 20.0
_ENTROPY_BYTES = 64
_CLONE_OUTPUT_S = 0.3
"""The delay of a clone's output, so that the client first receives its answer. There is no delay if the workload has
ended: then the client waits for the output."""


class RootFailed(Exception):
    """The guest can't mount its root filesystem. The text is for people, and partly from the guest."""


class VolumesFailed(AgentProtocolError):
    """The guest can't mount its volumes. The text is for people, and partly from the guest."""


class GuestLimits(msgspec.Struct, frozen=True):
    """Maximum number of guests that the daemon updates at a time."""

    clocks: trio.CapacityLimiter = msgspec.field(default_factory=lambda: trio.CapacityLimiter(1))
    """One at a time: setting a clock takes processor time from other guests, whose clocks then stay wrong."""
    hosts: trio.CapacityLimiter = msgspec.field(default_factory=lambda: trio.CapacityLimiter(HOSTS_AT_ONCE))


class AgentSession:
    """The session with the agent of one guest."""

    def __init__(
        self,
        host: Host,
        spec: MachineSpec,
        log: VmLog,
        boot_key: str,
        report: Callable[[Seen], Awaitable[None]],
        *,
        manifest: Mapping[str, object] | None,
        workload: Mapping[str, object] | None,
        volumes: Sequence[Mapping[str, object]],
        secrets: GuestSecrets | None,
        signal: str | None,
        peers: Peers,
        limits: GuestLimits,
        configured: bool,
        is_clone: bool,
        paused: bool,
        take_link: Callable[[], ParkedLink | None],
    ) -> None:
        """Creates the session.

        :param manifest, workload: the configuration of the guest; nothing is configured without a manifest
        :param volumes: the volumes that it mounts before (`GuestVolume`)
        :param secrets: the secrets that it receives before
        :param signal: the signal for a copied workload
        :param configured: an earlier incarnation of the actor configured the guest
        :param is_clone: the guest has another guest's identity until it receives its own
        :param paused: the guest is paused
        :param take_link: see `AgentConnection`
        """
        self._host = host
        self._name = spec.name
        self._log = log
        self._boot_key = boot_key
        self._report = report
        self._manifest = manifest
        self._workload = workload
        self._volumes = volumes
        self._secrets = secrets
        self._signal = signal
        self._peers = peers
        self._limits = limits
        self._configured_link: int | None = None
        self._output_error: str | None = None
        self._identity_assigned = trio.Event()
        self._workload_ended = trio.Event()
        if configured or not is_clone:
            self._identity_assigned.set()
        address = VirtioSerial(spec.agent_path) if spec.vsock_cid is None else Vsock(spec.vsock_cid)
        self.connection = AgentConnection(host, address, take_link=take_link, paused=paused)
        self.clock = GuestClock(host, self.connection)
        self.configured = configured
        self._hosts = HostsEntries(self.connection, peers)

    @property
    def protocol(self) -> int:
        """The newest protocol that the agent is known to support; the oldest one while unknown."""
        return self.connection.protocol or PROTOCOL_MIN

    def inspect(self) -> dict[str, object]:
        """Returns figures, ready for JSON."""
        return {**self.connection.inspect(), "output_error": self._output_error}

    async def run(self) -> None:
        """Keeps the session until cancelled."""
        async with self.connection.open(), trio.open_nursery() as nursery:
            if not self.configured:
                nursery.start_soon(self._repair_clock)
            if self._workload is not None:
                nursery.start_soon(self._keep_workload)
            if self._peers.can_change:
                nursery.start_soon(self._keep_hosts)
            await self._keep_output()

    async def _repair_clock(self) -> None:
        if not await self.clock.repair(self._limits.clocks):
            text = "VM %s: its clock can't be set exactly: the host is too busy, or the guest's clock runs too fast"
            _logger.warning(text, self._name, extra={"vm": self._name})

    async def root_mounted(self) -> None:
        """Waits until the guest has mounted its root filesystem.

        :raises AgentUnreachable: it has not yet, or can't be asked.
        :raises RootFailed: it can't mount it.
        :raises AgentProtocolError: it has no root filesystem to mount.
        """
        root = await self.connection.get(DAEMON_ROOT, _ROOT_S)
        match root.get("state"):
            case "mounted":
                return
            case "pending":
                raise AgentUnreachable("the root filesystem is not mounted yet")
            case "failed":
                raise RootFailed(f"the guest can't mount its root filesystem: {detail_of(root)}")
            case _:
                raise AgentProtocolError("its initramfs mounts no root filesystem")

    async def mount_volumes(self, sizes: Mapping[str, int] | None = None) -> None:
        """Requests that the guest mounts its unmounted volumes, and grows them.

        :param sizes: the sizes in bytes of volumes that have just grown, by serial number
        :raises AgentUnreachable: it can't be reached, or is busy with a mount.
        :raises VolumesFailed: it can't mount them.
        """
        if not self._volumes:
            return
        if (self.connection.protocol or await self.connection.negotiate()) < VOLUMES_SINCE:
            raise VolumesFailed("its agent is too old to mount volumes; the VM has to boot a newer image")
        grown = sizes or {}
        volumes = [
            {**volume, "bytes": grown[serial]} if (serial := str(volume.get("serial"))) in grown else volume
            for volume in self._volumes
        ]
        status, detail = await self.connection.try_put(DAEMON_VOLUMES, {"volumes": volumes}, _VOLUMES_S)
        if status == 503:
            raise AgentUnreachable(f"the volumes are not mounted yet: {detail}")
        if status != 200:
            raise VolumesFailed(f"the guest can't mount its volumes: {detail}")

    async def give_secrets(self, protocol: int | None = None) -> None:
        """Sends the guest the values of its secrets, unless it has those of this boot.

        :param protocol: the newest protocol that its agent is known to support
        :raises AgentUnreachable:
        :raises SecretsFailed: it can't receive them.
        """
        secrets = self._secrets
        if secrets is None:
            return
        connection = self.connection
        if (protocol or connection.protocol or 0) < SECRETS_SINCE and await connection.negotiate() < SECRETS_SINCE:
            raise SecretsFailed(
                "secret_failed", "its agent is too old to take secrets; the VM has to boot a newer image"
            )
        if self.configured and (await connection.get(DAEMON_SECRETS, _SECRETS_S)).get("boot") == secrets.boot:
            # The values of a boot stay. A guest that runs does not depend on the key.
            return
        status, detail = await connection.try_put(DAEMON_SECRETS, await secrets.body(), _SECRETS_S)
        if status == 503:
            raise AgentUnreachable(f"the guest does not take its secrets yet: {detail}")
        if status != 200:
            raise SecretsFailed("secret_failed", f"the guest can't take its secrets: {detail}")

    async def assign_identity(
        self, hostname: str, machine_id: str, vm_id: int, *, protocol: int, as_it_is: bool = False
    ) -> None:
        """Gives a clone its identity, fresh entropy, the time, and its configuration; returns once the guest has them.

        :param protocol: the newest protocol that its agent is known to support
        :param as_it_is: its workload may be unhealthy or have ended, like the workload of the copied VM
        :raises AgentUnreachable: it can't be reached.
        :raises AgentProtocolError: it refuses, with a reason.
        """
        connection = self.connection
        # The identity has the time in it, so it is not sent before the agent can receive it.
        await connection.ready()
        await self.give_secrets(protocol)
        link = connection.link
        interface, hosts = self._peers.interface(), self._peers.hosts()
        if interface is not None and protocol < IDENTITY_NETWORK_SINCE:
            protocol = await connection.negotiate()
            if protocol < IDENTITY_NETWORK_SINCE:
                raise AgentProtocolError("its agent is too old to configure its network interface")
        identity: dict[str, object] = {
            "hostname": hostname,
            "machine_id": machine_id,
            "vm_id": vm_id,
            "entropy": base64.b64encode(self._host.random.token_bytes(_ENTROPY_BYTES)).decode(),
            "time_ns": self.clock.now_ns(),
            "signal": self._signal,
        }
        if interface is not None:
            identity["network"] = interface
        at_once = protocol >= IDENTITY_WORKLOAD_SINCE and self._manifest is not None
        if as_it_is and protocol >= IDENTITY_AS_IT_IS_SINCE:
            # The agent has manifest and workload from the VM that it is a copy of. Like each agent, it gets them again
            # before its output is read.
            identity["as_it_is"] = True
            link = None
        elif at_once:
            identity["manifest"] = self._manifest
            if self._workload is not None:
                identity["workload"] = self._workload
        try:
            answer = await connection.put(DAEMON_IDENTITY, identity)
            connection.agree(answer.get("protocol"))
            shown_ns = answer["time_ns"]
        except WorkloadNotHealthy:
            if not as_it_is:
                raise
            # The agent has done everything else.
            at_once, shown_ns = False, 0
            await connection.negotiate()
        self._hosts.sent = hosts
        await self.clock.check(shown_ns)
        if at_once:
            self._set_configured(link)
        else:
            await self.configure(negotiated=True)

    async def configure(self, *, negotiated: bool = False) -> None:
        """Agrees on a protocol, and sends the agent its manifest and its workload. From then on, each agent of this
        boot receives them: a restarted agent has none.

        :raises AgentUnreachable: :raises AgentProtocolError: as `AgentConnection.ask`.
        """
        connection, link = self.connection, self.connection.link
        if not negotiated:
            await connection.negotiate()
        if self._peers.can_change and self._hosts.sent is None:
            # Before the workload looks its peers up. A guest that refuses them now gets them later.
            with suppress(AgentProtocolError):
                await self._hosts.send()
        if self._manifest is None:
            self._identity_assigned.set()
            return
        await self.mount_volumes()
        await self.give_secrets()
        # Agents of older guests have no use for it.
        await connection.ask("PUT", DAEMON_MANIFEST, self._manifest, also=(404,))
        if self._workload is not None:
            await connection.ask("PUT", DAEMON_WORKLOAD, self._workload)
        self._set_configured(link)

    def _set_configured(self, link: int | None) -> None:
        self.configured, self._configured_link = True, link
        self._identity_assigned.set()

    async def _keep_hosts(self) -> None:
        await self._identity_assigned.wait()
        await self._hosts.keep(self._limits.hosts)

    async def _keep_workload(self) -> None:
        """Reports the workload's state until cancelled. Returns if the agent is too old for that."""
        await self._identity_assigned.wait()

        async def report(workload: WorkloadView | None) -> None:
            if workload is not None and workload.state in ("exited", "failed"):
                self._workload_ended.set()
            await self._report(WorkloadChanged(workload))

        backoff = Backoff(_RETRY_S, _RETRY_MAX_S, steady_s=_RETRY_MAX_S)
        limit = ReportLimit()
        while True:
            with suppress(AgentUnreachable, AgentProtocolError, ValueError):
                await self.connection.ready()
                client = self.connection.client
                if client is not None and not await follow_workload(client, report, limit):
                    return
            await backoff.pause()

    async def _keep_output(self) -> None:
        """Carries the workload's output into the VM's log, as long as there is a connection."""
        connection, log_id = self.connection, ""
        if not self._identity_assigned.is_set():
            # Until then the output has the id of the template's.
            await self._identity_assigned.wait()
            with trio.move_on_after(_CLONE_OUTPUT_S):
                await self._workload_ended.wait()
        backoff = Backoff(_RETRY_S, _RETRY_MAX_S, steady_s=_RETRY_MAX_S)
        while True:
            await connection.ready()
            try:
                if self.configured and (connection.link is None or connection.link != self._configured_link):
                    await self.configure()
                if connection.client is not None:
                    log_id = await pump_output(connection.client, self._log, self._boot_key, log_id)
            except (AgentUnreachable, AgentProtocolError, ValueError) as error:
                # A guest that sends nonsense harms its own log alone.
                self._output_error = str(error)
            await backoff.pause()
