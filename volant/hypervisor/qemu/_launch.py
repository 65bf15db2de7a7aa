"""Starts a QEMU process and waits until it answers on its control socket."""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack

import trio

from volant.host import PROGRAM_ENVIRONMENT, Host, Process, ProcessGone
from volant.hypervisor._interface import LaunchCode, LaunchFailed, MachineSpec, Nic
from volant.model import ProcessIdentity

from ._argv import FORMAT, build_argv
from ._compatibility import HEAD_BYTES, STATE_LIMIT, format_in, machine_of
from ._layers import check_layer
from ._machine import log_tail
from ._migration import Migration
from ._netdev import open_tap, plug_in
from ._qmp import QmpClient, QmpLost, QmpRefused, connect_control
from ._sandbox import QemuSandbox
from ._volume_disks import LEAST_QEMU

LAUNCH_S = 15.0
SPARE_MEMORY_MB = 192
"""The memory that the host must have besides the guest's: for QEMU itself and, under TCG, its translated code."""

_APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
_CAUSES: tuple[tuple[LaunchCode, tuple[str, ...]], ...] = (
    ("memory_refused", ("cannot allocate memory", "cannot set up guest memory", "no space left", "unable to map")),
    ("bad_disk", ("-blockdev",)),
    ("kvm_unavailable", ("kvm",)),
    (
        "bad_image",
        ("could not open kernel", "could not load kernel", "initrd", "kernel image", "linux kernel", "ram disk"),
    ),
)


async def launch(
    host: Host, spec: MachineSpec, program: str, version: tuple[int, int], sandbox: QemuSandbox | None
) -> ProcessIdentity:
    """Implements `Hypervisor.launch`."""
    try:
        await prepare_files(host, spec)
        identity = await _spawn(host, spec, program, version, sandbox)
        try:
            process = host.processes.open(identity)
        except ProcessGone:
            raise await _failure(host, spec, "QEMU ended at once") from None
        with process:
            await _await_answer(host, spec, process)
        return identity
    except LaunchFailed:
        # Memory is the host's scarcest resource.
        await host.files.remove(spec.memory_file)
        raise


async def prepare_files(host: Host, spec: MachineSpec) -> None:
    """Creates and checks all files that QEMU opens, as its own errors come late and are hard to read."""
    for path, what in ((spec.kernel, "kernel"), (spec.initramfs, "initramfs")):
        if not host.files.exists(path):
            raise LaunchFailed("bad_image", f"the {what} {path} is missing")
    for path in (spec.template.memory, spec.template.state) if spec.template is not None else ():
        if not host.files.exists(path):
            raise LaunchFailed("template_refused", f"the template's file {path} is missing")
    root = spec.root
    for part in (root.base, root.layer, root.image) if root is not None else ():
        if part is not None and not host.files.exists(part):
            raise LaunchFailed("bad_disk", f"the disk's file {part} is missing")
    if root is not None:
        await check_layer(host, root.layer)
    try:
        await host.files.mkdir(spec.directory)
        for path in (spec.control_path, spec.agent_path, spec.log_path):
            await host.files.remove(path)
        await host.files.make_fifo(spec.console_input_path)
        host.descriptors.close(host.descriptors.open(spec.console_path, _APPEND))
    except OSError as error:
        raise LaunchFailed("exited", f"the machine's directory can't be prepared: {error}") from error
    # Memory that other guests gave back is not available, as they may take it again.
    available_mb = host.machine.spare_memory_mb(spec.memory_file.parent)
    if available_mb < spec.memory_mb + SPARE_MEMORY_MB:
        raise LaunchFailed(
            "memory_refused", f"the host has {available_mb} MiB of memory left, the guest needs {spec.memory_mb}"
        )
    if spec.template is None:
        await _allocate_memory(host, spec)


async def _allocate_memory(host: Host, spec: MachineSpec) -> None:
    directory = spec.memory_file.parent
    try:
        # Allocated now: if the host had no memory for a page later, the guest would die of SIGBUS.
        await host.files.mkdir(directory)
        await host.disk.allocate(spec.memory_file, spec.memory_mb * 1024 * 1024)
        # Checked afterwards, so that of two launches at the same time neither misses the other.
        if host.disk.free(directory) < host.disk.unbacked(directory):
            raise OSError(errno.ENOSPC, "the rest is reserved for guests that gave memory back")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
            raise LaunchFailed("exited", f"the guest's memory can't be allocated: {error}") from error
        raise LaunchFailed(
            "memory_refused",
            f"{directory} has no space for {spec.memory_mb} MiB of guest memory: {error.strerror}",
        ) from error


async def _spawn(
    host: Host, spec: MachineSpec, program: str, version: tuple[int, int], sandbox: QemuSandbox | None
) -> ProcessIdentity:
    machine, devices = None, FORMAT
    if spec.template is not None:
        try:
            state = await host.files.read(spec.template.state, STATE_LIMIT)
            machine, devices = machine_of(state[:HEAD_BYTES]), format_in(state)
        except OSError as error:
            raise LaunchFailed("template_refused", f"{spec.template.state} can't be read: {error}") from error
    try:
        restrictions = None if sandbox is None else await sandbox.prepare(spec)
    except OSError as error:
        raise LaunchFailed("exited", f"QEMU's sandbox can't be set up: {error}") from error
    if spec.directories and version < LEAST_QEMU:
        raise LaunchFailed(
            "exited", f"directories of the host need QEMU {'.'.join(map(str, LEAST_QEMU))}, and this is older"
        )
    with ExitStack() as stack:
        taps, connections = [], []
        if spec.nic is not None and spec.nic.tap is not None:
            try:
                taps = [await open_tap(host, spec.nic.tap, stack)]
            except OSError as error:
                raise LaunchFailed("exited", f"the tap {spec.nic.tap} can't be opened: {error}") from error
        for directory in spec.directories:
            try:
                connections.append(stack.enter_context(await host.sockets.open_unix(directory.socket, LAUNCH_S)))
            except (OSError, trio.TooSlowError) as error:
                raise LaunchFailed(
                    "exited", f"virtiofsd can't be reached at {directory.socket}: {str(error) or 'no answer'}"
                ) from error
        argv = build_argv(
            spec,
            version,
            program,
            machine=machine,
            devices=devices,
            tsc_khz=host.machine.tsc_khz(),
            tap=taps[0] if taps else -1,
            connections=connections,
        )
        try:
            return await host.processes.spawn(
                argv,
                tag=spec.tag,
                env=PROGRAM_ENVIRONMENT,
                cwd=spec.directory,
                stdout_path=spec.log_path,
                sandbox=restrictions,
                descriptors=(*taps, *connections),
            )
        except OSError as error:
            raise LaunchFailed("qemu_missing", f"QEMU can't be started: {error}") from error


async def _await_answer(host: Host, spec: MachineSpec, process: Process) -> None:
    """Waits until QEMU answers and its machine is complete: a clone has loaded its template and runs, and its NIC is
    connected. Ends the process otherwise."""
    answered = False
    refusal: LaunchFailed | None = None

    async def ask(scope: trio.CancelScope) -> None:
        nonlocal answered, refusal
        try:
            await _complete_machine(host, spec)
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
        raise await _failure(host, spec, f"QEMU {how}")
    process.kill()
    with trio.move_on_after(LAUNCH_S):
        await process.wait()
    if refusal is not None:
        raise refusal
    output = await log_tail(host, spec.log_path)
    raise LaunchFailed("no_answer", f"QEMU did not answer within {LAUNCH_S:.0f} s" + (f": {output}" if output else ""))


async def _complete_machine(host: Host, spec: MachineSpec) -> None:
    """Completes a machine over its control socket. :raises LaunchFailed: QEMU refuses. Never returns if the socket
    fails: the process ends, or the deadline passes."""
    try:
        stream = await connect_control(host, spec.control_path, LAUNCH_S)
    except (OSError, trio.TooSlowError):
        await trio.sleep_forever()
    lost = False
    refused: LaunchFailed | None = None
    async with stream, trio.open_nursery() as nursery:
        try:
            migration = Migration()
            qmp = QmpClient(stream, migration.on_event, host.random)
            await nursery.start(qmp.start)
            if spec.template is not None:
                await migration.load(host, spec, qmp)
            if spec.nic is not None and spec.nic.socket is not None:
                await _connect_nic(host, qmp, spec.nic)
            if spec.template is not None and not spec.start_paused:
                await qmp.execute("cont")
        except QmpLost:
            lost = True
        except QmpRefused as error:
            refused = LaunchFailed("template_refused", str(error))
        except LaunchFailed as error:
            refused = error
        nursery.cancel_scope.cancel()
    if refused is not None:
        raise refused
    if lost:
        await trio.sleep_forever()


async def _connect_nic(host: Host, qmp: QmpClient, nic: Nic) -> None:
    """Connects the NIC. Raises LaunchFailed, QmpLost."""
    try:
        await plug_in(host, qmp, nic)
    except (OSError, trio.TooSlowError, QmpRefused) as error:
        why = f"QEMU can't be connected to the VM's network at {nic.socket}: {str(error) or 'no answer'}"
        raise LaunchFailed("exited", why) from error


async def _failure(host: Host, spec: MachineSpec, what: str) -> LaunchFailed:
    output = await log_tail(host, spec.log_path)
    code = classify(output)
    if code == "exited" and spec.template is not None:
        # A machine that boots can fail in more ways; a clone fails because of its template.
        code = "template_refused"
    return LaunchFailed(code, f"{what}: {output}" if output else f"{what} without any output")


def classify(text: str) -> LaunchCode:
    """Returns the cause according to QEMU's last output."""
    lower = text.lower()
    for code, needles in _CAUSES:
        if any(needle in lower for needle in needles):
            return code
    return "exited"
