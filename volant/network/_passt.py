"""Networks of the kind `user`: a process of passt for each VM, which speaks for its guest as a user of the host's.

It goes into the background by itself once its socket is there and its ports are bound, so that whoever started it knows
either that or why not. `--one-off`: it ends with its hypervisor, whoever looks on. `--no-map-gw`: else a guest would
reach what listens on the host's loopback at its gateway's address, this daemon's API among it. What it says is
bounded by itself.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from volant.host import Bounds, Grant, Host, ProcessGone
from volant.model import Lease, ProcessIdentity, PublishedPort, VmRow

from ._backend import NetworkFailed

PROGRAM = "passt"
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
_START_S = 10.0
_END_S = 10.0
_LOG_BYTES = 1024 * 1024
_SAID_CHARACTERS = 500
_READ_WRITE = 6
_logger = logging.getLogger("volant.network")
_GROUP = 65534
"""Nobody's: groups of hypervisors' numbers may read templates."""
_BOUNDS = Bounds(memory_mb=256, cpus=1, weight=100, tasks=8)
"""It takes some 60 MiB, and has one thread."""


def passt_argv(
    socket: Path, log: Path, tag: str, lease: Lease, ports: Sequence[PublishedPort], user: int | None = None
) -> list[str]:
    """The command line for one VM. `user`: as whom it runs; None: as we do, or as it chooses when we are root."""
    argv = [
        *(PROGRAM, "--quiet", "--one-off", "--ipv4-only", "--no-map-gw"),
        # The guest is told otherwise.
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
    """Why there can be none here, and what to do."""
    if shutil.which(PROGRAM, path=_ENVIRONMENT["PATH"]) is None:
        return "passt is not installed: apt-get install passt, and restart the daemon"
    return None


def passt_socket(runtime_dir: Path, vm_id: int) -> Path:
    """Where the hypervisor of a VM finds the process that speaks for its guest. In no directory of a VM's, as those are
    moved about."""
    return runtime_dir / "net" / f"{vm_id}.sock"


@dataclass(frozen=True)
class Passt:
    """The processes of one daemon."""

    host: Host
    runtime_dir: Path
    instance: str
    user: int | None = None
    """As whom all of them run; see `passt_user`."""

    def socket(self, vm_id: int) -> Path:
        """Where the hypervisor finds the one of a VM."""
        return passt_socket(self.runtime_dir, vm_id)

    async def start(self, row: VmRow) -> None:
        """Have one there, and return once it listens. It may have been started before.

        :raises NetworkFailed: `passt_missing`, `passt_failed`.
        """
        if row.lease is None:
            return
        host, tag, socket = self.host, self._tag(row.id), self.socket(row.id)
        found = await self._find(row.id)
        if found and self.user is not None:
            self._warn_of_others(row, found[0])
        if not found or not host.exists(socket):
            await self.end(row.id)
            argv = passt_argv(socket, self._log(row.id), tag, row.lease, row.ports, self.user)
            try:
                await host.mkdir(socket.parent)
                # Written first, so that no process which nobody has connected to is taken for a connected one.
                await host.write_bytes(self._unconnected(row.id), b"")
                status, said = await host.run_program(argv, env=_ENVIRONMENT, cwd=Path("/"), timeout_s=_START_S)
            except FileNotFoundError:
                raise NetworkFailed(
                    "passt_missing", "passt is not installed: apt-get install passt, then start the VM again"
                ) from None
            except (OSError, trio.TooSlowError) as error:
                raise NetworkFailed("passt_failed", f"passt can't be started: {error or 'it takes too long'}") from None
            found = await self._find(row.id)
            if status != 0 or not found:
                words = said.decode(errors="replace").strip()[-_SAID_CHARACTERS:] or "it ended without a word"
                raise NetworkFailed("passt_failed", f"passt does not run: {words}")
            await host.give_own_scope(found[0], f"network of VM {row.name}", _BOUNDS)

    def is_connected(self, vm_id: int) -> bool:
        """Returns whether the hypervisor of a VM has a connection to the process that runs. This outlives the daemon,
        and holds for processes that earlier versions of the daemon started."""
        return not self.host.exists(self._unconnected(vm_id))

    async def note_connected(self, vm_id: int) -> None:
        """Notes that the hypervisor of a VM has its connection. Raises NetworkFailed: `passt_failed`."""
        try:
            await self.host.remove_file(self._unconnected(vm_id))
        except OSError as error:
            raise NetworkFailed("passt_failed", f"{self._unconnected(vm_id)} can't be removed: {error}") from error

    async def lend(self, vm_id: int, user: int | None) -> None:
        """Lets the user of a hypervisor connect to the socket by itself, as one that an earlier version of the daemon
        started does. `user`: None where it is the daemon's own. Raises NetworkFailed: `passt_failed`."""
        if user is None:
            return
        try:
            await self.host.grant([Grant(self.socket(vm_id), "user", user, _READ_WRITE)], [self.runtime_dir])
        except OSError as error:
            raise NetworkFailed("passt_failed", f"passt's socket can't be handed over: {error}") from error

    def _warn_of_others(self, row: VmRow, found: ProcessIdentity) -> None:
        """Say that one was started by a daemon that filtered nothing. To end it would cost its guest's connections."""
        with suppress(ProcessGone):
            if self.host.process_status(found).user != self.user:
                _logger.warning(
                    "VM %s: an earlier daemon has started its passt, whose destinations are not filtered, so the guest "
                    "reaches this host's own addresses until the VM is stopped and started",
                    row.name, extra={"vm": row.name},
                )  # fmt: skip

    async def ended(self, vm_id: int) -> None:
        """Return once a VM has none."""
        for found in await self._find(vm_id):
            with suppress(ProcessGone), self.host.open_process(found) as process:
                await process.wait()

    async def end(self, vm_id: int) -> None:
        """Leave nothing of the one of a VM. :raises NetworkFailed: `passt_failed`."""
        host = self.host
        try:
            with trio.fail_after(_END_S):
                await host.end(await self._find(vm_id))
            # It ends with its hypervisor, perhaps just now.
            await host.remove_empty_scopes(self._tag(vm_id))
            for path in (self.socket(vm_id), self._log(vm_id), self._unconnected(vm_id)):
                await host.remove_file(path)
        except (OSError, trio.TooSlowError) as error:
            raise NetworkFailed("passt_failed", f"passt can't be ended: {error or 'it does not end'}") from error

    async def any_runs(self) -> bool:
        """Whether there is one of any VM. Reads all of /proc."""
        return bool(await self.host.processes(f"volant-{self.instance}-n.", of_anybody=True))

    async def _find(self, vm_id: int) -> list[ProcessIdentity]:
        """The processes of a VM: those of our user, and those of anybody that have open the log, which only the daemon
        can open. Root's passt of earlier daemons is `nobody`, and who else is that can run another one with the same
        arguments."""
        tag, found = self._tag(vm_id), []
        for identity in await self.host.processes(tag, of_anybody=True):
            with suppress(ProcessGone):
                if identity.tag == tag and (
                    self.host.is_of_ours(identity) or self.host.has_open(identity, self._log(vm_id))
                ):
                    found.append(identity)
        return found

    def _tag(self, vm_id: int) -> str:
        # Unlike a hypervisor's: it is none.
        return f"volant-{self.instance}-n.{vm_id}"

    def _log(self, vm_id: int) -> Path:
        return self.socket(vm_id).with_suffix(".log")

    def _unconnected(self, vm_id: int) -> Path:
        return self.socket(vm_id).with_suffix(".unconnected")
