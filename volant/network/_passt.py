"""Runs the network `user`: a process of passt for each VM, which opens the guest's connections as a user of the host.

passt goes into the background once its socket listens and its ports are bound, so its exit status shows whether they
are. With `--one-off` it ends with its hypervisor, even without a daemon. Without `--no-map-gw` a guest could reach the
host's loopback, where the daemon's API listens, at its gateway's address.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import trio

from volant.host import PROGRAM_ENVIRONMENT, Grant, Host, ProcessGone, ResourceLimits
from volant.model import USER, Lease, Phase, ProcessIdentity, PublishedPort, VmRow, is_restricted, kind_of

from ._backend import NetworkFailed

PROGRAM = "passt"
_START_S = 10.0
_END_S = 10.0
_LOG_BYTES = 1024 * 1024
_MAX_ERROR = 500
"""Maximum characters of passt's output in an error."""
_READ_WRITE = 6
_logger = logging.getLogger("volant.network")
_GROUP = 65534
"""`nogroup`, because a group among `vm_uids` may read templates."""
_BOUNDS = ResourceLimits(memory_mb=256, cpus=1, weight=100, tasks=8)
"""passt needs about 60 MiB and has one thread."""


def passt_argv(
    socket: Path, log: Path, tag: str, lease: Lease, ports: Sequence[PublishedPort], user: int | None = None
) -> list[str]:
    """Returns the command line for one VM. `user` is None for the daemon's own user, or for passt's default if that is
    root."""
    argv = [
        *(PROGRAM, "--quiet", "--one-off", "--ipv4-only", "--no-map-gw"),
        # The guest gets its address from the kernel's command line or from the agent.
        *("--no-dhcp", "--hostname", tag),
        *("--address", lease.address, "--netmask", str(lease.prefix), "--gateway", lease.gateway),
        *("--socket", str(socket), "--log-file", str(log), "--log-size", str(_LOG_BYTES)),
    ]
    if user is not None:
        argv += ["--runas", f"{user}:{_GROUP}"]
    for protocol, option in (("tcp", "--tcp-ports"), ("udp", "--udp-ports")):
        wanted = [port for port in ports if port.protocol == protocol]
        for port in wanted:
            argv += [option, f"{port.host}/{port.host_port}:{port.guest_port}"]
        if not wanted:
            argv += [option, "none"]
    return argv


def passt_obstacle() -> str | None:
    """Returns why no VM can have the network `user` and what to do, or None."""
    if shutil.which(PROGRAM, path=PROGRAM_ENVIRONMENT["PATH"]) is None:
        return "passt is not installed: run `apt-get install passt` and restart the daemon"
    return None


def passt_socket(runtime_dir: Path, vm_id: int) -> Path:
    """Returns the path of the socket of a VM's passt. It is outside of the VM's directory, which may be renamed."""
    return runtime_dir / "net" / f"{vm_id}.sock"


def has_passt(row: VmRow) -> bool:
    """Returns whether a VM has a passt, or is about to."""
    return kind_of(row.network) == USER and bool(row.tag) and row.phase not in (Phase.KILL, Phase.REMOVE)


class Passt(msgspec.Struct, frozen=True):
    """Manages the passt processes of one daemon."""

    host: Host
    runtime_dir: Path
    instance: str
    user: int | None = None
    """The user of all passts except those below; see `passt_user`."""
    users: range = range(0)
    """The users of passts of VMs with an egress policy, which the firewall distinguishes by their users."""

    def user_of(self, row: VmRow) -> int | None:
        """Returns the user of a VM's passt. Two VMs share a user if their ids are far apart."""
        if not is_restricted(row.egress):
            return self.user
        return self.users[row.id % len(self.users)] if self.users else None

    def socket(self, vm_id: int) -> Path:
        """Returns the path of the socket of a VM's passt."""
        return passt_socket(self.runtime_dir, vm_id)

    async def start(self, row: VmRow) -> None:
        """Starts a VM's passt, unless it runs already, and returns when it listens.

        :raises NetworkFailed: `passt_missing`, `passt_failed`.
        """
        if row.lease is None:
            return
        host, tag, socket = self.host, self._tag(row.id), self.socket(row.id)
        found = await self._find(row.id)
        if found and self.user_of(row) is not None:
            self._warn_if_unfiltered(row, found[0])
        if not found or not host.files.exists(socket):
            await self.end(row.id)
            argv = passt_argv(socket, self._log(row.id), tag, row.lease, row.ports, self.user_of(row))
            try:
                await host.files.mkdir(socket.parent)
                # Written first: without the file, a process counts as connected.
                await host.files.write(self._unconnected(row.id), b"")
                status, said = await host.processes.run(
                    argv, env=PROGRAM_ENVIRONMENT, cwd=Path("/"), timeout_s=_START_S
                )
            except FileNotFoundError:
                raise NetworkFailed(
                    "passt_missing", "passt is not installed: run `apt-get install passt`, then start the VM again"
                ) from None
            except (OSError, trio.TooSlowError) as error:
                raise NetworkFailed(
                    "passt_failed", f"passt can't be started: {str(error) or 'it takes too long'}"
                ) from None
            found = await self._find(row.id)
            if status != 0 or not found:
                output = said.decode(errors="replace").strip()[-_MAX_ERROR:] or "it ended without any output"
                raise NetworkFailed("passt_failed", f"passt does not run: {output}")
            await host.limits.apply(found[0], f"network of VM {row.name}", _BOUNDS)

    def is_connected(self, vm_id: int) -> bool:
        """Returns whether the hypervisor of a VM is connected to its running passt. Survives the daemon, and also works
        for processes of earlier versions."""
        return not self.host.files.exists(self._unconnected(vm_id))

    async def note_connected(self, vm_id: int) -> None:
        """Records that the hypervisor of a VM is connected. Raises NetworkFailed: `passt_failed`."""
        try:
            await self.host.files.remove(self._unconnected(vm_id))
        except OSError as error:
            raise NetworkFailed("passt_failed", f"{self._unconnected(vm_id)} can't be removed: {error}") from error

    async def lend(self, vm_id: int, user: int | None) -> None:
        """Lets the user of a hypervisor connect to the socket by itself, for hypervisors started by an earlier version
        of the daemon. `user` is None for the daemon's own. Raises NetworkFailed: `passt_failed`."""
        if user is None:
            return
        try:
            await self.host.sandbox.grant([Grant(self.socket(vm_id), "user", user, _READ_WRITE)], [self.runtime_dir])
        except OSError as error:
            raise NetworkFailed("passt_failed", f"access to passt's socket can't be granted: {error}") from error

    def _warn_if_unfiltered(self, row: VmRow, found: ProcessIdentity) -> None:
        """Logs that an earlier, non-filtering version of the daemon started this process. Ending it would break the
        guest's connections."""
        with suppress(ProcessGone):
            if self.host.proc.status(found).user != self.user_of(row):
                _logger.warning(
                    "VM %s: an earlier version of the daemon started its passt without a filter: the guest reaches "
                    "this host's own addresses until you stop and start the VM",
                    row.name, extra={"vm": row.name},
                )  # fmt: skip

    async def ended(self, vm_id: int) -> None:
        """Waits until a VM's passt has ended."""
        for found in await self._find(vm_id):
            with suppress(ProcessGone), self.host.processes.open(found) as process:
                await process.wait()

    async def end(self, vm_id: int) -> None:
        """Ends a VM's passt and removes its files. :raises NetworkFailed: `passt_failed`."""
        host = self.host
        try:
            with trio.fail_after(_END_S):
                await host.processes.end(await self._find(vm_id))
            # passt may have ended with its hypervisor just now.
            await host.limits.remove_empty(self._tag(vm_id))
            for path in (self.socket(vm_id), self._log(vm_id), self._unconnected(vm_id)):
                await host.files.remove(path)
        except (OSError, trio.TooSlowError) as error:
            raise NetworkFailed("passt_failed", f"passt can't be ended: {str(error) or 'it does not end'}") from error

    async def any_runs(self) -> bool:
        """Returns whether any VM's passt runs. Reads all of /proc."""
        return bool(await self.host.processes.scan(f"volant-{self.instance}-n.", of_anybody=True))

    async def _find(self, vm_id: int) -> list[ProcessIdentity]:
        """Returns a VM's passt processes: those of the daemon's users, and those that have the log open, which only the
        daemon can open. Earlier versions ran passt as `nobody`, and any process of that user could have the same
        arguments."""
        tag, found = self._tag(vm_id), []
        for identity in await self.host.processes.scan(tag, of_anybody=True):
            with suppress(ProcessGone):
                if identity.tag == tag and (
                    self.host.proc.is_ours(identity) or self.host.proc.has_open(identity, self._log(vm_id))
                ):
                    found.append(identity)
        return found

    def _tag(self, vm_id: int) -> str:
        # A hypervisor's tag has no `n.`.
        return f"volant-{self.instance}-n.{vm_id}"

    def _log(self, vm_id: int) -> Path:
        return self.socket(vm_id).with_suffix(".log")

    def _unconnected(self, vm_id: int) -> Path:
        return self.socket(vm_id).with_suffix(".unconnected")
