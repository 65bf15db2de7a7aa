"""The hypervisor QEMU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import trio

from volant.concurrency import open_helpers
from volant.host import PROGRAM_ENVIRONMENT, Host
from volant.hypervisor._interface import (
    NOT_STARTED,
    AcceleratorChoice,
    AcceleratorName,
    Disk,
    HypervisorError,
    LaunchFailed,
    Machine,
    MachineKind,
    MachineSpec,
    ParkedControl,
    ParsedMachine,
)
from volant.model import ProcessIdentity

from ._argv import FORMAT, PROGRAM, machine_option, machine_type
from ._compatibility import incompatibility, parse_machines
from ._launch import launch
from ._layers import make_layer
from ._machine import ParkedQmp, attach
from ._netdev import plug_in
from ._parse_argv import parse_argv
from ._probe import probe, qemu_version
from ._qmp import QmpClient
from ._sandbox import QemuSandbox, SandboxPlan, user_of

RESUME_S = 5.0

_MISSING = f"QEMU is not installed: there is no program {PROGRAM} (Debian: apt install qemu-system-x86)"
_HELP_S = 10.0


class QemuHypervisor:
    """The QEMU driver, see `volant.hypervisor.Hypervisor`.

    :param accelerator: KVM or TCG; None uses KVM if a probe shows that it runs guests
    :param sandbox: the layers for its processes; None for only QEMU's own `-sandbox`
    """

    name = "qemu"

    def __init__(
        self,
        host: Host,
        cache_dir: Path,
        *,
        accelerator: AcceleratorName | None = None,
        program: str = PROGRAM,
        sandbox: SandboxPlan | None = None,
    ) -> None:
        self._host = host
        self._sandbox = None if sandbox is None else QemuSandbox(host, sandbox)
        self._cache_dir = cache_dir
        self._forced = accelerator
        self._program = program
        self._version: tuple[int, int, str] | None = None
        self._choice: AcceleratorChoice | None = None
        self._choosing = trio.Lock()
        self._machines: frozenset[str] = frozenset()
        """QEMU's machine types; empty until QEMU lists them."""

    async def choice(self) -> AcceleratorChoice:
        async with self._choosing:
            if self._choice is None:
                choice = await self._choose()
                if choice.version is None:
                    return choice  # QEMU may be installed later
                self._choice = choice
            return self._choice

    async def accelerator(self) -> AcceleratorName:
        return (await self.choice()).accelerator

    async def _choose(self) -> AcceleratorChoice:
        self._version = await qemu_version(self._host, self._program)
        if self._version is None:
            return AcceleratorChoice(self._forced or "tcg", _MISSING, None)
        if self._forced is not None:
            return AcceleratorChoice(self._forced, "chosen by the setting accelerator", self._version[2])
        return await probe(self._host, self._cache_dir, self._program, self._version)

    async def fingerprint(self) -> str:
        accelerator = await self.accelerator()
        if self._version is None:
            return "none"
        machine = machine_option(accelerator, self._version[:2])
        mhz = self._host.machine.tsc_khz() // 1000
        return f"qemu {self._version[2]}, {accelerator}, {machine}, {FORMAT}, {mhz} MHz"

    def user_of(self, tag: str, vm_id: int) -> int | None:
        users = None if self._sandbox is None else self._sandbox.plan.users
        return None if users is None else user_of(users, tag, vm_id)

    async def incompatibility(self, kind: MachineKind) -> str | None:
        accelerator = await self.accelerator()
        if self._version is None:
            return _MISSING
        here = MachineKind(
            version=self._version[2],
            accelerator=accelerator,
            machine=machine_type(accelerator, self._version[:2]),
            devices=FORMAT,
            tsc_khz=self._host.machine.tsc_khz(),
        )
        if kind.machine == here.machine:
            return incompatibility(kind, here, {here.machine})
        known = await self._known_machines()
        return incompatibility(kind, here, known) if known else f"{self._program} does not list its machine types"

    async def _known_machines(self) -> frozenset[str]:
        if not self._machines:
            command = [self._program, "-machine", "help"]
            try:
                status, output = await self._host.processes.run(
                    command, env=PROGRAM_ENVIRONMENT, cwd=Path("/"), timeout_s=_HELP_S
                )
            except (OSError, trio.TooSlowError):
                return frozenset()
            if status == 0:
                self._machines = parse_machines(output)
        return self._machines

    async def make_layer(self, disk: Disk, like: Path | None = None) -> None:
        await make_layer(self._host, disk, like)

    async def launch(self, spec: MachineSpec) -> ProcessIdentity:
        await self.choice()
        if self._version is None:
            raise LaunchFailed("qemu_missing", _MISSING)
        return await launch(self._host, spec, self._program, self._version[:2], self._sandbox)

    async def resume_warm(self, spec: MachineSpec, control: ParkedControl | None = None) -> None:
        try:
            with trio.fail_after(RESUME_S):
                if isinstance(control, ParkedQmp):
                    await self._resume_warm(spec, control.qmp, paused=control.paused)
                    control.paused = False
                    return
                async with await self._host.sockets.connect_unix(spec.control_path, RESUME_S) as stream:
                    qmp = QmpClient(stream, lambda name, data: None, self._host.random)
                    await self._resume_warm(spec, qmp, paused=False)
        except (OSError, trio.TooSlowError) as error:
            raise HypervisorError(f"the machine can't be resumed: {str(error) or 'no answer'}") from error

    async def _resume_warm(self, spec: MachineSpec, qmp: QmpClient, *, paused: bool) -> None:
        """Resumes a warm machine. `paused` is whether it is known to be paused. :raises OSError: :raises
        HypervisorError:"""
        async with open_helpers() as helpers:
            await helpers.start(qmp.start)
            status = "paused" if paused else (await qmp.execute("query-status")).get("status")
            if status in NOT_STARTED:
                raise HypervisorError("the machine has not loaded its template, so it was never warm")
            if status != "running":
                await plug_in(self._host, qmp, spec.nic)
            await qmp.execute("cont", timeout_s=RESUME_S)
            qmp.park()

    def parse_command_line(self, command_line: Sequence[str]) -> ParsedMachine | None:
        return parse_argv(command_line)

    def attach(
        self, spec: MachineSpec, identity: ProcessIdentity, control: ParkedControl | None = None
    ) -> AbstractAsyncContextManager[Machine]:
        return attach(self._host, spec, identity, control if isinstance(control, ParkedQmp) else None)
