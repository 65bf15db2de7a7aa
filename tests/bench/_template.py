"""Measures the time from `POST /api/v1/vms` with a template to the agent's first answer with its own identity.

It is compared with a script, with a cold boot of the same VM, and with `virsh restore` of a guest that libvirt saved
after its boot. The script starts QEMU on the template's memory, loads its state and resumes it through QMP, connects to
the agent's port, and sends a request. It uses the daemon's command line and template, but assigns no identity: entropy,
clock and names, which the daemon's clone has before it answers.
"""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Self

import httpx
import msgspec
import trio

from tests.system.kit import Daemon
from volant.host import Host
from volant.hypervisor import MachineSpec, Template
from volant.hypervisor.qemu._migration import Migration
from volant.hypervisor.qemu._qmp import QmpClient

from ._boot import BOOT_S, WANTED, Bare, Ours, Side, _accelerator, _argv, _spec, ask_agent
from ._figure import Figure, Pairs, percentile
from ._libvirt import Libvirt, libvirt
from ._world import Skipped, current_image, volantd

TARGET = 1.5
STANDBY_TARGET = 0.7
STANDBY_TO_COLD = 20.0
READY_S = 20.0
LIBVIRT_TARGET = 4.0
_COLD = 3
_RESTORES = 5
_SETTLE_S = 0.3
_CONNECT_S = 10.0
_LOOK_AGAIN_S = 0.001


async def template_to_agent(pairs: int = 15) -> list[Figure]:
    """Clones by the daemon and by the script in turns, with some cold boots and restores by libvirt between them."""
    with ExitStack() as stack:
        sides = await _Sides.begin(stack, "--templates", "auto")
        for number in range(pairs):
            await sides.measure(number, pairs)
    against = sides.against
    return [
        Figure(
            "template_to_agent", against.value, "s", against.ratio,
            f"a bare script's {against.other:.3g} s for the same clone, {pairs} pairs, p95 {sides.slowest_s:.3g} s",
            at_most=TARGET,
        ),
        Figure(
            "template_ready", sides.ready_s, "s", to="from the first VM's `running` to the template of its kind",
            within=READY_S,
        ),
        Figure(
            "template_to_cold", sides.cold_s, "s", sides.cold_s / against.value,
            "a clone, for a cold boot of the same VM",
        ),
        *sides.restored_figure("template_to_libvirt", "a clone"),
    ]  # fmt: skip


async def standby_to_agent(pairs: int = 15) -> list[Figure]:
    """VMs from the warm pool and clones by the script in turns; also some cold boots and restores by libvirt."""
    with ExitStack() as stack:
        sides = await _Sides.begin(stack, "--templates", "auto", "--standby", "1")
        for number in range(pairs):
            await until_one_waits(sides.daemon)
            await sides.measure(number, pairs)
        async with sides.daemon.http() as http:
            said = (await http.get("/metrics")).text
        if f"volant_standby_claims_total {pairs:.1f}" not in said.splitlines():
            raise RuntimeError(f"not every clone took over a process that waited:\n{said}")
    against = sides.against
    return [
        Figure(
            "standby_to_agent", against.value, "s", against.ratio,
            f"a bare script's {against.other:.3g} s that starts QEMU for the same clone, {pairs} pairs, "
            f"p95 {sides.slowest_s:.3g} s",
            at_most=STANDBY_TARGET,
        ),
        Figure(
            "standby_to_cold", sides.cold_s, "s", sides.cold_s / against.value,
            "a clone whose process waited, for a cold boot of the same VM", at_least=STANDBY_TO_COLD,
        ),
        *sides.restored_figure("standby_to_libvirt", "a clone whose process waited"),
    ]  # fmt: skip


@dataclass
class _Sides:
    """The same VM as a clone by the daemon and by the script, booted cold, and restored by libvirt if possible."""

    daemon: Daemon
    ready_s: float
    """From the first VM's `running` to the template."""
    ours: Ours
    bare: BareClone
    cold: Ours
    libvirt: Libvirt | None
    against: Pairs = field(default_factory=Pairs)
    restored: Pairs = field(default_factory=Pairs)
    took_cold: list[float] = field(default_factory=list)

    @classmethod
    async def begin(cls, stack: ExitStack, *arguments: str) -> Self:
        """Starts a daemon with these arguments, and waits for the template."""
        image = current_image()
        daemon = stack.enter_context(volantd(*arguments))
        spec = stack.enter_context(_spec(image, await _accelerator(daemon)))
        directory, ready_s = await first_template(daemon)
        clone = msgspec.structs.replace(spec, template=Template(directory / "memory", directory / "state"))
        ours, cold = Ours(daemon, boot="template"), Ours(daemon, boot="cold")
        bare = BareClone(clone, await _argv(clone))
        return cls(daemon, ready_s, ours, bare, cold, await _saved(stack, spec))

    async def measure(self, number: int, pairs: int) -> None:
        """Measures the pair of this number, and sometimes the other sides."""
        bare_s = await _settled(self.bare.boot)
        self.against.add(await _settled(self.ours.boot), bare_s)
        if self.libvirt is not None and number % (pairs // _RESTORES or 1) == 0:
            self.restored.add(await _settled(self.libvirt.restore), self.against.ours[-1])
        if number % (pairs // _COLD or 1) == 0:
            self.took_cold.append(await _settled(self.cold.boot))

    @property
    def slowest_s(self) -> float:
        return percentile(self.against.ours, 95)

    @property
    def cold_s(self) -> float:
        return median(self.took_cold)

    def restored_figure(self, name: str, what: str) -> list[Figure]:
        """Returns the figure of libvirt, if there is one."""
        restored, to = self.restored, f"{what}, for `virsh restore` of the same VM"
        if not restored.ours:
            return []
        return [Figure(name, restored.value, "s", restored.ratio, to, at_least=LIBVIRT_TARGET)]


async def _settled(side: Side) -> float:
    await trio.sleep(_SETTLE_S)
    return await side()


async def until_one_waits(daemon: Daemon) -> None:
    async with daemon.http() as http:
        with trio.fail_after(BOOT_S):
            while "volant_standby_waiting 1.0" not in (await http.get("/metrics")).text:  # noqa: ASYNC110
                await trio.sleep(_SETTLE_S)


async def _saved(stack: ExitStack, spec: MachineSpec) -> Libvirt | None:
    """Gives a libvirt with the same guest saved, if possible."""
    try:
        peer = stack.enter_context(libvirt(spec, WANTED))
        await peer.save()
    except (Skipped, RuntimeError, subprocess.TimeoutExpired) as why:
        print(f"libvirt skipped: {why}", flush=True)
        return None
    return peer


class BareClone(Bare):
    """Starts the daemon's command line, and sends the commands through QMP."""

    async def ask(self) -> None:
        spec = self._spec
        assert spec.template is not None
        migration = Migration()
        async with await _connect(spec.control_path) as stream, trio.open_nursery() as nursery:
            qmp = QmpClient(stream, migration.on_event, Host().random)
            await nursery.start(qmp.start)
            await migration.load(Host(), spec, qmp)
            await qmp.execute("cont")
            nursery.cancel_scope.cancel()
        await ask_agent(spec.agent_path)


async def _connect(path: Path) -> trio.SocketStream:
    with trio.fail_after(_CONNECT_S):
        while True:
            try:
                return await Host().sockets.connect_unix(path, _CONNECT_S)
            except (FileNotFoundError, ConnectionRefusedError):
                await trio.sleep(_LOOK_AGAIN_S)


async def _template(daemon: Daemon) -> Path:
    """Returns the directory of the template that the first VM's boot causes."""
    return (await first_template(daemon))[0]


async def first_template(daemon: Daemon, host: str | None = None) -> tuple[Path, float]:
    """Returns the directory of the template that the first VM's boot causes, and its delay after `running`. `host`: the
    daemon's name in its fleet"""
    async with daemon.http() as http:
        if host is not None:
            # Otherwise another host might get the VM.
            http.headers["Volant-Host"] = host
        wanted = {"name": "first", "cpu_cores": WANTED.cpu_cores, "memory_mb": WANTED.memory_mb}
        made = await http.post(f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json=wanted, timeout=2 * BOOT_S)
        if made.headers.get("volant-wait") != "met":
            raise RuntimeError(f"the first VM does not boot: {made.text}")
        began = time.perf_counter()
        while not (ready := await _ready(http)):
            if time.perf_counter() - began > BOOT_S:
                raise RuntimeError(f"there is no template: {daemon.log()}")
            await trio.sleep(_LOOK_AGAIN_S * 20)
        ready_s = time.perf_counter() - began
        (await http.delete("/api/v1/vms/first", timeout=90)).raise_for_status()
        return daemon.state_dir / "templates" / ready, ready_s


async def _ready(http: httpx.AsyncClient) -> str:
    """Waits for the template; returns its digest."""
    views = (await http.get("/api/v1/templates")).raise_for_status().json()
    return next((str(view["digest"]) for view in views if view["state"] == "ready"), "")
