"""Measures the time from `POST /api/v1/vms` to the agent's first answer, against a bare command that boots the guest.

The baseline is a script without Volant: start QEMU, connect to the agent's port, send a request. It uses the daemon's
command line, so the difference is the daemon's other work: the row and its events on disk, memory reserved in advance,
QMP, the console's log, HTTP. Both request `/v1/info` once, and neither polls: the daemon's client waits with
`?wait=running`, the script for the channel.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import trio

from tests.system.kit import Daemon, cache_dir
from volant.channel import AgentClient, VirtioSerial, open_channel
from volant.host import PROGRAM_ENVIRONMENT, Host
from volant.hypervisor import AcceleratorName, MachineSpec
from volant.hypervisor.qemu._argv import PROGRAM, build_argv
from volant.hypervisor.qemu._probe import qemu_version
from volant.images import Image
from volant.model import BootMode, CreateVm, Manifest, VmRow
from volant.vm import VmSettings
from volant.vm._machine_spec import machine_spec

from ._figure import Figure, Pairs
from ._libvirt import libvirt
from ._world import Skipped, current_image, kill_group, scratch, start_program, volantd

BOOT_S = 120.0
WANTED = CreateVm(name="bench", cpu_cores=1, memory_mb=128)
TARGET = 1.10

_SETTLE_S = 0.3
"""Pause between two boots, in which the kernel cleans up after the last one."""

Side = Callable[[], Awaitable[float]]


async def create_to_agent(pairs: int = 5) -> list[Figure]:
    """The ratio to the bare command, and that of libvirt if it can run here."""
    image = current_image()
    for path in (image.kernel, image.initramfs):
        path.read_bytes()  # now in the page cache, for all sides
    took: dict[str, list[float]] = {}
    with ExitStack() as stack:
        daemon = stack.enter_context(volantd())
        accelerator = await _accelerator(daemon)
        spec = stack.enter_context(_spec(image, accelerator))
        ours, bare = Ours(daemon), Bare(spec, await _argv(spec))
        sides: dict[str, Side] = {"bare": bare.boot, "ours": ours.boot}
        try:
            sides["libvirt"] = stack.enter_context(libvirt(spec, WANTED)).boot
        except Skipped as why:
            print(f"create_to_agent_libvirt skipped: {why}", flush=True)
        names = list(sides)
        for _ in range(pairs):
            for name in [*names]:
                await trio.sleep(_SETTLE_S)
                try:
                    took.setdefault(name, []).append(await sides[name]())
                except (RuntimeError, subprocess.TimeoutExpired) as error:
                    if name != "libvirt":
                        raise
                    print(f"create_to_agent_libvirt failed: {error}", flush=True)
                    names.remove(name)
                    took.pop(name, None)
            # Rotate the order.
            names.append(names.pop(0))
    against, cpu = Pairs(took["ours"], took["bare"]), Pairs(ours.cpu_s, bare.cpu_s)
    figures = [
        Figure(
            "create_to_agent", against.value, "s", against.ratio,
            f"the bare QEMU command's {against.other:.3g} s, {pairs} pairs, {accelerator}", at_most=TARGET,
        ),
        Figure(
            "create_to_agent_cpu", cpu.value, "s", cpu.ratio,
            f"the bare command's {cpu.other:.3g} s of processor time; QEMU's, and ours the daemon's too",
        ),
    ]  # fmt: skip
    if "libvirt" in took:
        other = Pairs(took["libvirt"], took["bare"])
        figures.append(
            Figure("create_to_agent_libvirt", other.value, "s", other.ratio, "the same bare command, by `virsh create`")
        )
    return figures


class Ours:
    """Boots a VM through the API of a real daemon."""

    def __init__(self, daemon: Daemon, boot: BootMode = "cold", network: str = "none") -> None:
        self._daemon = daemon
        self._boot = boot
        self._network = network
        self.cpu_s: list[float] = []

    async def boot(self) -> float:
        """Creates a VM, asks its agent, and deletes the VM; returns the seconds until the answer."""
        async with self._daemon.http() as http:
            # Do not measure the connection and the first-time costs of the client.
            (await http.get("/healthz")).raise_for_status()
            body: dict[str, object] = {
                "name": WANTED.name,
                "cpu_cores": WANTED.cpu_cores,
                "memory_mb": WANTED.memory_mb,
            }
            body |= {"boot": self._boot, "network": self._network}
            cpu_before_s = cpu_s(self._daemon.pid)
            began = time.perf_counter()
            made = await http.post(f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json=body, timeout=2 * BOOT_S)
            info = await http.get(f"/api/v1/vms/{WANTED.name}/agent/v1/info")
            seconds = time.perf_counter() - began
            if made.headers.get("volant-wait") != "met" or "boot_id" not in info.json():
                raise RuntimeError(f"the VM did not boot: {made.text}\n{self._daemon.log()}")
            self.cpu_s.append(cpu_s(self._daemon.pid) - cpu_before_s + cpu_s(made.json()["pid"]))
            (await http.delete(f"/api/v1/vms/{WANTED.name}", timeout=90)).raise_for_status()
            return seconds


class Bare:
    """Boots the guest with the daemon's command line, but without a daemon."""

    def __init__(self, spec: MachineSpec, argv: list[str]) -> None:
        self._spec = spec
        self._argv = argv
        self.cpu_s: list[float] = []

    async def boot(self) -> float:
        """Starts it, asks its agent, and removes everything; returns the seconds until the answer."""
        with scratch_of(self._spec):
            began = time.perf_counter()
            async with self.running() as process:
                seconds = time.perf_counter() - began
                self.cpu_s.append(cpu_s(process.pid))
                return seconds

    @asynccontextmanager
    async def running(self) -> AsyncIterator[subprocess.Popen[bytes]]:
        """Starts it, waits for its agent's answer, and kills it at the end of the block. Use it inside `scratch_of`."""
        process = self._start()
        try:
            try:
                await self.ask()
            except Exception as error:
                said = self._spec.log_path.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the bare guest did not answer: {error}\n{said}") from error
            yield process
        finally:
            kill_group(process)

    async def ask(self) -> None:
        """Waits until the agent has answered."""
        await ask_agent(self._spec.agent_path)

    def _start(self) -> subprocess.Popen[bytes]:
        return start_program(self._argv, self._spec.directory, self._spec.log_path, PROGRAM_ENVIRONMENT)


async def ask_agent(socket_path: Path) -> None:
    """Asks the agent for `/v1/info` through its socket, as soon as the socket exists."""
    async with open_channel(Host(), VirtioSerial(socket_path)) as channel:
        answer = await AgentClient(channel).request_json("GET", "/v1/info", timeout_s=BOOT_S)
    if "boot_id" not in answer.body:
        raise RuntimeError(f"the agent answered {answer}")


def cpu_s(pid: int) -> float:
    """Returns the processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def scratch_of(spec: MachineSpec) -> Iterator[None]:
    """Creates the directories that QEMU expects, and removes them."""
    for path in spec.directory.iterdir():
        path.unlink()
    spec.console_input_path.unlink(missing_ok=True)
    subprocess.run(["mkfifo", str(spec.console_input_path)], check=True)
    try:
        yield
    finally:
        spec.memory_file.unlink(missing_ok=True)


BASE = Manifest(name="base", version="0")


@contextmanager
def _spec(
    image: Image, accelerator: AcceleratorName, wanted: CreateVm = WANTED, manifest: Manifest = BASE
) -> Iterator[MachineSpec]:
    """Returns the daemon's spec of such a VM, with other directories."""
    with scratch() as directory, scratch("/dev/shm") as memory:
        settings = VmSettings(
            state_dir=directory,
            runtime_dir=directory,
            cache_dir=cache_dir(),
            memory_dir=memory,
            disk_dir=directory,
            template_dir=directory,
            snapshot_dir=directory,
            volume_dir=directory,
        )
        spec = machine_spec(settings, row_of(wanted, manifest, image.digest), accelerator)
        spec.directory.mkdir(parents=True, mode=0o700)
        yield spec


def row_of(wanted: CreateVm, manifest: Manifest = BASE, image: str | None = None) -> VmRow:
    """Returns the row of such a VM."""
    now = datetime.now(UTC)
    assert wanted.cpu_cores is not None
    assert wanted.memory_mb is not None
    return VmRow(
        id=1, name=wanted.name, cpu_cores=wanted.cpu_cores, memory_mb=wanted.memory_mb, plugin=manifest.name,
        runtime="base", manifest=manifest, created_at=now, updated_at=now, image=image, tag="volant-bench-1.1",
        layer="" if manifest.boot is None else "layer",
    )  # fmt: skip


async def _argv(spec: MachineSpec) -> list[str]:
    version = await qemu_version(Host(), PROGRAM)
    assert version is not None
    return build_argv(spec, version[:2])


async def _accelerator(daemon: Daemon) -> AcceleratorName:
    """Waits for the daemon's probe; returns its accelerator."""
    async with daemon.http() as http:
        with trio.fail_after(BOOT_S):
            while True:
                name = (await http.get("/api/v1/system/info")).json()["accelerator"]
                if name is not None:
                    return "kvm" if name == "kvm" else "tcg"
                await trio.sleep(0.1)
