"""libvirt as the peer: `virsh create` and `restore` of the same guest, without touching the host's libvirt.

`libvirtd` and `virtlogd` run in their own mount and PID namespace, with empty filesystems for their state, so they do
not meet a libvirt of the host or its configuration, and all of it ends with one process. This needs root.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import trio

from volant.hypervisor import MachineSpec
from volant.hypervisor.qemu._argv import kernel_cmdline
from volant.model import CreateVm
from volant.model.agent import SERIAL_PORT_NAME

from ._world import Skipped, kill_group, run, scratch, start_program

_START_S = 20.0
_COMMAND_S = 20.0
_SETTLE_S = 1.0
"""Pause after the boot, for deferred work of the guest and for its agent to become idle."""

_QEMU_CONF = """
user = "root"
group = "root"
dynamic_ownership = 0
remember_owner = 0
security_driver = "none"
cgroup_controllers = []
namespaces = []
"""


class Libvirt:
    """A running `libvirtd`."""

    def __init__(self, directory: Path, spec: MachineSpec, wanted: CreateVm) -> None:
        self._directory = directory
        self._agent = directory / "agent.sock"
        self._domain = directory / "domain.xml"
        self._domain.write_text(_domain(spec, wanted, self._agent, directory / "console.log"))
        self._saved = directory / "saved"
        self._uri = f"qemu+unix:///system?mode=direct&socket={directory / 'libvirt-sock'}"

    def virsh(self, *words: str) -> str:
        """Runs `virsh`. :raises RuntimeError: if it fails"""
        return run(["virsh", "--quiet", "--connect", self._uri, *words], _COMMAND_S)

    async def boot(self) -> float:
        """Runs `virsh create`; returns the seconds until the agent's answer. Destroys the domain."""
        async with self._running("create", self._domain) as seconds:
            return seconds

    async def save(self) -> None:
        """Boots the guest, and runs `virsh save` without a connection to its agent."""
        async with self._running("create", self._domain):
            await trio.sleep(_SETTLE_S)
            await trio.to_thread.run_sync(self.virsh, "save", "bench", str(self._saved))

    async def restore(self) -> float:
        """Runs `virsh restore`; returns the seconds until the agent's answer. Destroys the domain."""
        async with self._running("restore", self._saved) as seconds:
            return seconds

    @asynccontextmanager
    async def _running(self, verb: str, source: Path) -> AsyncIterator[float]:
        from ._boot import ask_agent

        self._agent.unlink(missing_ok=True)
        began = time.perf_counter()
        try:
            await trio.to_thread.run_sync(self.virsh, verb, str(source))
            await ask_agent(self._agent)
            yield time.perf_counter() - began
        finally:
            with trio.CancelScope(shield=True), trio.move_on_after(_COMMAND_S):
                await trio.to_thread.run_sync(self._destroy)

    def _destroy(self) -> None:
        if self.virsh("list", "--name"):
            self.virsh("destroy", "bench")


@contextmanager
def libvirt(spec: MachineSpec, wanted: CreateVm) -> Iterator[Libvirt]:
    """Runs a libvirt until the block ends. :raises Skipped: if it is not installed, or cannot start here"""
    missing = [name for name in ("libvirtd", "virtlogd", "virsh", "unshare") if shutil.which(name) is None]
    if missing:
        raise Skipped(f"libvirt is not installed: there is no {missing[0]} (Debian: libvirt-daemon-driver-qemu)")
    if os.geteuid() != 0:
        raise Skipped("only root can run a libvirtd apart from the host's")
    if spec.accelerator != "tcg":
        raise Skipped("its domain here is made for TCG")
    with scratch() as directory:
        log = directory / "log"
        process = start_program([*_NAMESPACES, _script(directory)], Path.cwd(), log)
        try:
            peer = Libvirt(directory, spec, wanted)
            give_up_at = time.monotonic() + _START_S
            while True:
                try:
                    peer.virsh("version")
                    break
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    if process.poll() is not None or time.monotonic() > give_up_at:
                        said = log.read_text(errors="replace").strip().splitlines()[-1:]
                        raise Skipped(f"libvirtd does not start: {said[0] if said else error}") from None
                    time.sleep(0.1)
            yield peer
        finally:
            # SIGTERM does not end it; its end ends the namespace and everything in it.
            kill_group(process)


_NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-ec")


def _script(directory: Path) -> str:
    here = shlex.quote(str(directory))
    state = ("/run", "/etc/libvirt", "/var/lib/libvirt", "/var/cache/libvirt", "/var/log/libvirt")
    lines = [f"mkdir -p {path}; mount -t tmpfs tmpfs {path}" for path in state if Path(path).is_dir()]
    return "\n".join(
        [
            *lines,
            f"printf %s {shlex.quote(_QEMU_CONF)} > /etc/libvirt/qemu.conf",
            f"echo 'unix_sock_dir = \"{directory}\"' > /etc/libvirt/libvirtd.conf",
            "echo 'auth_unix_rw = \"none\"' >> /etc/libvirt/libvirtd.conf",
            "virtlogd --daemon",
            f"libvirtd --config /etc/libvirt/libvirtd.conf --pid-file {here}/libvirtd.pid",
            # Not as the last command, which the shell would exec: as PID 1, libvirtd does not reap orphaned
            # processes, and waits for ever for a QEMU that it has killed.
            "exit",
        ]
    )


def _domain(spec: MachineSpec, wanted: CreateVm, agent: Path, console: Path) -> str:
    """Returns libvirt's XML of the same guest: machine, processor, memory, kernel and the agent's channel."""
    return f"""
<domain type='qemu'>
  <name>bench</name>
  <memory unit='MiB'>{wanted.memory_mb}</memory>
  <vcpu>{wanted.cpu_cores}</vcpu>
  <cpu mode='maximum'/>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>
    <kernel>{escape(str(spec.kernel))}</kernel>
    <initrd>{escape(str(spec.initramfs))}</initrd>
    <cmdline>{escape(kernel_cmdline(spec))}</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <panic model='pvpanic'/>
    <serial type='file'><source path={quoteattr(str(console))}/></serial>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <channel type='unix'>
      <source mode='bind' path={quoteattr(str(agent))}/>
      <target type='virtio' name={quoteattr(SERIAL_PORT_NAME)}/>
    </channel>
  </devices>
</domain>
"""
