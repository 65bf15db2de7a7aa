"""QEMU, as this daemon uses it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path

import trio

from volant.host import Host, Process, ProcessGone
from volant.hypervisor._interface import (
    NOT_YET_RUN,
    AcceleratorChoice,
    AcceleratorName,
    Disk,
    FoundMachine,
    HypervisorError,
    LaunchCode,
    LaunchFailed,
    Machine,
    MachineKind,
    MachineSpec,
    Nic,
)
from volant.model import ProcessIdentity

from ._argv import ENVIRONMENT, FORMAT, PROGRAM, build_argv, machine_option, machine_type
from ._found import parse_argv
from ._kind import HEAD_BYTES, machine_of, misfit, parse_machines
from ._machine import attach, last_words
from ._migration import Migration
from ._netdev import plug_in
from ._probe import probe, qemu_version
from ._qmp import QmpClient, QmpLost, QmpRefused
from ._sandbox import QemuSandbox, SandboxPlan, user_of

LAUNCH_S = 15.0
GO_ON_S = 5.0
SPARE_MEMORY_MB = 192
"""What must be left on the host beside a guest's memory: QEMU itself, and under TCG its translated code."""

_RETRY_S = 0.005
_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
_MISSING = "QEMU is not installed: there is no program qemu-system-x86_64 (Debian: apt install qemu-system-x86)"
_HELP_S = 10.0
_IMG = "qemu-img"
_IMG_S = 60.0
_IMG_MISSING = "there is no program qemu-img (Debian: apt install qemu-utils)"
_QCOW2 = b"QFI\xfb"
_EXTERNAL_DATA = 1 << 2
"""Of the features of a qcow2 image without which nobody may open it."""
_CAUSES: tuple[tuple[LaunchCode, tuple[str, ...]], ...] = (
    ("memory_refused", ("cannot allocate memory", "cannot set up guest memory", "no space left", "unable to map")),
    ("bad_disk", ("-blockdev",)),
    ("kvm_unavailable", ("kvm",)),
    (
        "bad_image",
        ("could not open kernel", "could not load kernel", "initrd", "kernel image", "linux kernel", "ram disk"),
    ),
)


class QemuHypervisor:
    """See `volant.hypervisor.Hypervisor`.

    `accelerator` forces KVM or TCG; None takes KVM where a probe has shown that it runs guests. `sandbox`: the
    layers for its processes; None: only QEMU's own `-sandbox`.
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
        """The types that QEMU has, once it was asked."""

    async def choice(self) -> AcceleratorChoice:
        async with self._choosing:
            if self._choice is None:
                choice = await self._choose()
                if choice.version is None:
                    return choice  # it may be installed by the next time
                self._choice = choice
            return self._choice

    async def accelerator(self) -> AcceleratorName:
        return (await self.choice()).accelerator

    async def _choose(self) -> AcceleratorChoice:
        self._version = await qemu_version(self._host, self._program)
        if self._version is None:
            return AcceleratorChoice(self._forced or "tcg", _MISSING, None)
        if self._forced is not None:
            return AcceleratorChoice(self._forced, "the settings say so", self._version[2])
        return await probe(self._host, self._cache_dir, self._program, self._version)

    async def fingerprint(self) -> str:
        accelerator = await self.accelerator()
        if self._version is None:
            return "none"
        return f"qemu {self._version[2]}, {accelerator}, {machine_option(accelerator, self._version[:2])}, {FORMAT}"

    def user_of(self, tag: str, vm_id: int) -> int | None:
        users = None if self._sandbox is None else self._sandbox.plan.users
        return None if users is None else user_of(users, tag, vm_id)

    async def misfit(self, kind: MachineKind) -> str | None:
        accelerator = await self.accelerator()
        if self._version is None:
            return _MISSING
        here = MachineKind(
            version=self._version[2],
            accelerator=accelerator,
            machine=machine_type(accelerator, self._version[:2]),
            devices=FORMAT,
        )
        if kind.machine == here.machine:
            return misfit(kind, here, {here.machine})
        known = await self._known_machines()
        return misfit(kind, here, known) if known else f"{self._program} does not say which machines it has"

    async def _known_machines(self) -> frozenset[str]:
        """None, while it does not say."""
        if not self._machines:
            command = [self._program, "-machine", "help"]
            try:
                status, said = await self._host.processes.run(
                    command, env=ENVIRONMENT, cwd=Path("/"), timeout_s=_HELP_S
                )
            except (OSError, trio.TooSlowError):
                return frozenset()
            if status == 0:
                self._machines = parse_machines(said)
        return self._machines

    async def make_layer(self, disk: Disk, like: Path | None = None) -> None:
        host = self._host
        fresh = disk.layer.with_name(f"{disk.layer.name}.new")
        if like is not None:
            try:
                await host.files.remove(fresh)
                await host.files.copy(like, fresh)
                await host.files.put_in_place(fresh, disk.layer)
            except OSError as error:
                raise LaunchFailed("bad_disk", f"the layer {disk.layer} can't be made: {error}") from error
            return
        command = [_IMG, "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(disk.base), str(fresh)]
        if disk.size_mb is not None:
            command.append(f"{disk.size_mb}M")
        try:
            await host.files.remove(fresh)
            status, said = await host.processes.run(command, env=ENVIRONMENT, cwd=disk.layer.parent, timeout_s=_IMG_S)
            if status != 0:
                text = said.decode("utf-8", "replace").strip()[-500:]
                raise LaunchFailed("bad_disk", f"the layer {disk.layer} can't be made: {text}")
            await host.files.put_in_place(fresh, disk.layer)
        except trio.TooSlowError:
            raise LaunchFailed("bad_disk", f"qemu-img made no layer within {_IMG_S:g} s") from None
        except FileNotFoundError as error:
            if error.filename != _IMG:
                raise LaunchFailed("bad_disk", f"the layer {disk.layer} can't be made: {error}") from error
            raise LaunchFailed("qemu_missing", _IMG_MISSING) from None
        except OSError as error:
            raise LaunchFailed("bad_disk", f"the layer {disk.layer} can't be made: {error}") from error

    async def launch(self, spec: MachineSpec) -> ProcessIdentity:
        await self.choice()
        if self._version is None:
            raise LaunchFailed("qemu_missing", _MISSING)
        try:
            return await self._launch(spec)
        except LaunchFailed:
            # Memory is what the host has least of.
            await self._host.files.remove(spec.memory_file)
            raise

    async def _launch(self, spec: MachineSpec) -> ProcessIdentity:
        assert self._version is not None
        await self._prepare(spec)
        machine = None
        if spec.template is not None:
            try:
                machine = machine_of(await self._host.files.read(spec.template.state, HEAD_BYTES))
            except OSError as error:
                raise LaunchFailed("template_refused", f"{spec.template.state} can't be read: {error}") from error
        try:
            sandbox = None if self._sandbox is None else await self._sandbox.prepare(spec)
        except OSError as error:
            raise LaunchFailed("exited", f"QEMU's sandbox can't be set up: {error}") from error
        with ExitStack() as stack:
            taps = []
            if spec.nic is not None and spec.nic.tap is not None:
                try:
                    taps = [stack.enter_context(self._host.sockets.open_tap(spec.nic.tap))]
                except OSError as error:
                    raise LaunchFailed("exited", f"the tap {spec.nic.tap} can't be opened: {error}") from error
            argv = build_argv(spec, self._version[:2], self._program, machine=machine, tap=taps[0] if taps else -1)
            try:
                identity = await self._host.processes.spawn(
                    argv,
                    tag=spec.tag,
                    env=ENVIRONMENT,
                    cwd=spec.directory,
                    stdout_path=spec.log_path,
                    sandbox=sandbox,
                    descriptors=taps,
                )
            except OSError as error:
                raise LaunchFailed("qemu_missing", f"QEMU cannot be started: {error}") from error
        try:
            process = self._host.processes.open(identity)
        except ProcessGone:
            raise await self._why(spec, "QEMU ended at once") from None
        with process:
            await self._await_control(spec, process)
        return identity

    async def go_on(self, spec: MachineSpec) -> None:
        failure: HypervisorError | None = None
        try:
            with trio.fail_after(GO_ON_S):
                stream = await self._host.sockets.connect_unix(spec.control_path, GO_ON_S)
                async with stream, trio.open_nursery() as nursery:
                    try:
                        qmp = QmpClient(stream, lambda name, data: None)
                        await nursery.start(qmp.start)
                        status = (await qmp.execute("query-status")).get("status")
                        if status in NOT_YET_RUN:
                            raise HypervisorError("it has not taken over its template, so it is none that has waited")
                        if status != "running":
                            await plug_in(self._host, qmp, spec.nic)
                        await qmp.execute("cont", timeout_s=GO_ON_S)
                    except HypervisorError as error:
                        failure = error
                    nursery.cancel_scope.cancel()
        except (OSError, trio.TooSlowError) as error:
            raise HypervisorError(f"the machine can't be told to go on: {error or 'no answer'}") from error
        if failure is not None:
            raise failure

    def recognise(self, command_line: Sequence[str]) -> FoundMachine | None:
        return parse_argv(command_line)

    def attach(self, spec: MachineSpec, identity: ProcessIdentity) -> AbstractAsyncContextManager[Machine]:
        return attach(self._host, spec, identity)

    async def _prepare(self, spec: MachineSpec) -> None:
        """Everything that QEMU expects to find. What would fail late or cryptically fails here with a reason."""
        host = self._host
        for path, what in ((spec.kernel, "kernel"), (spec.initramfs, "initramfs")):
            if not host.files.exists(path):
                raise LaunchFailed("bad_image", f"the {what} {path} is missing")
        for path in (spec.template.memory, spec.template.state) if spec.template is not None else ():
            if not host.files.exists(path):
                raise LaunchFailed("template_refused", f"{path}, from which the guest goes on, is missing")
        for path in (spec.root.base, spec.root.layer) if spec.root is not None else ():
            if not host.files.exists(path):
                raise LaunchFailed("bad_disk", f"{path}, of which the guest's disk is made, is missing")
        if spec.root is not None:
            await self._check_layer(spec.root.layer)
        size = spec.memory_mb * 1024 * 1024
        try:
            await host.files.mkdir(spec.directory)
            for path in (spec.control_path, spec.agent_path, spec.log_path):
                await host.files.remove(path)
            await host.files.make_fifo(spec.console_input_path)
            host.descriptors.close(host.descriptors.open(spec.console_path, _APPEND))
        except OSError as error:
            raise LaunchFailed("exited", f"the machine's directory cannot be prepared: {error}") from error
        # What other guests have given back is theirs to take again.
        available_mb = host.machine.spare_memory_mb(spec.memory_file.parent)
        if available_mb < spec.memory_mb + SPARE_MEMORY_MB:
            raise LaunchFailed(
                "memory_refused", f"the host has {available_mb} MiB of memory left, the guest needs {spec.memory_mb}"
            )
        if spec.template is not None:
            return
        try:
            # Taken now: a page that cannot be had later would end the guest in the middle of its work (SIGBUS).
            await host.files.mkdir(spec.memory_file.parent)
            await host.disk.allocate(spec.memory_file, size)
            # Looked at afterwards, so that of two that are launched at once neither misses the other.
            if host.disk.free(spec.memory_file.parent) < host.disk.unbacked(spec.memory_file.parent):
                raise OSError(errno.ENOSPC, "what is left there has been given back by other guests, and is theirs")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
                raise LaunchFailed("exited", f"the guest's memory cannot be made: {error}") from error
            raise LaunchFailed(
                "memory_refused",
                f"{spec.memory_file.parent} has no room for {spec.memory_mb} MiB of guest memory: {error.strerror}",
            ) from error

    async def _check_layer(self, layer: Path) -> None:
        """A layer holds its data itself. One whose header names another file of the host for it was not made here: a
        guest that got out of QEMU would have written that, for QEMU to open at the next start."""
        head = await self._host.files.read(layer, 80)
        if head[:4] != _QCOW2 or len(head) < 80:
            raise LaunchFailed("bad_disk", f"{layer} is damaged: it is no qcow2 image any more")
        version, features = int.from_bytes(head[4:8], "big"), int.from_bytes(head[72:80], "big")
        if version < 3 or features & _EXTERNAL_DATA:
            raise LaunchFailed("bad_disk", f"{layer} is none that this daemon has made")

    async def _await_control(self, spec: MachineSpec, process: Process) -> None:
        """Return once QEMU answers on its control socket: then memory, kernel and devices are what they should be. One
        that goes on from a template has taken it over then, and runs. What is behind its NIC is plugged in."""
        answered = False
        refusal: LaunchFailed | None = None

        async def ask(scope: trio.CancelScope) -> None:
            nonlocal answered, refusal
            try:
                await self._greet(spec)
                answered = True
            except LaunchFailed as error:
                refusal = error
            scope.cancel()

        async def watch(scope: trio.CancelScope) -> None:
            await process.wait()
            scope.cancel()

        with trio.move_on_after(LAUNCH_S) as deadline:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, nursery.cancel_scope)
                nursery.start_soon(watch, nursery.cancel_scope)
        if answered:
            return
        if not deadline.cancelled_caught and process.exited:
            status = await process.wait()
            how = f"was killed by signal {-status}" if status is not None and status < 0 else f"exited with {status}"
            raise await self._why(spec, f"QEMU {how}")
        process.kill()
        with trio.move_on_after(LAUNCH_S):
            await process.wait()
        if refusal is not None:
            raise refusal
        last = await last_words(self._host, spec.log_path)
        raise LaunchFailed("no_answer", f"QEMU did not answer within {LAUNCH_S:.0f} s" + (f": {last}" if last else ""))

    async def _greet(self, spec: MachineSpec) -> None:
        with self._host.watches.open(spec.directory) as watch:
            while not self._host.files.exists(spec.control_path):
                await watch.wait()
        while True:
            try:
                stream = await self._host.sockets.connect_unix(spec.control_path, LAUNCH_S)
            except ConnectionRefusedError:
                await trio.sleep(_RETRY_S)  # bound, and not listening yet
                continue
            except (OSError, trio.TooSlowError):
                await trio.sleep_forever()  # the end of the process, or the deadline, says what it is
            lost: QmpLost | None = None
            refused: LaunchFailed | None = None
            async with stream, trio.open_nursery() as nursery:
                try:
                    migration = Migration()
                    qmp = QmpClient(stream, migration.on_event)
                    await nursery.start(qmp.start)
                    if spec.template is not None:
                        await migration.take_over(qmp, spec.template.state)
                    if spec.nic is not None and spec.nic.socket is not None:
                        await self._connect(qmp, spec.nic)
                    if spec.template is not None and not spec.waits:
                        await qmp.execute("cont")
                except QmpLost as error:
                    lost = error
                except QmpRefused as error:
                    refused = LaunchFailed("template_refused", str(error))
                except LaunchFailed as error:
                    refused = error
                nursery.cancel_scope.cancel()
            if refused is not None:
                raise refused
            if lost is not None:
                await trio.sleep_forever()
            return

    async def _connect(self, qmp: QmpClient, nic: Nic) -> None:
        """Plugs in the connection to a machine's socket. Raises LaunchFailed, QmpLost."""
        try:
            await plug_in(self._host, qmp, nic)
        except (OSError, trio.TooSlowError, QmpRefused) as error:
            why = f"QEMU can't be connected to the VM's network at {nic.socket}: {error or 'no answer'}"
            raise LaunchFailed("exited", why) from error

    async def _why(self, spec: MachineSpec, what: str) -> LaunchFailed:
        last = await last_words(self._host, spec.log_path)
        code = classify(last)
        if code == "exited" and spec.template is not None:
            # Of a machine that boots there is nothing else to refuse.
            code = "template_refused"
        return LaunchFailed(code, f"{what}: {last}" if last else f"{what} without a word")


def classify(text: str) -> LaunchCode:
    """What QEMU's last words mean."""
    lower = text.lower()
    for code, needles in _CAUSES:
        if any(needle in lower for needle in needles):
            return code
    return "exited"
