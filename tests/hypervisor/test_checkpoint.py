"""A checkpoint is a copy of a running machine at one instant, and the machine runs on afterwards."""

from __future__ import annotations

import errno
import os
import signal
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.hypervisor.kit import POWEROFF, tiny_spec
from volant.host import Host
from volant.host._files import LinuxFiles
from volant.hypervisor import CheckpointFailed, Disk, Machine, MachineSpec, Template, VolumeDisk
from volant.hypervisor.qemu import QemuHypervisor
from volant.hypervisor.qemu._machine import QemuMachine
from volant.model import EndKind, ProcessIdentity as Identity

pytestmark = pytest.mark.programs

COUNTER = 0x200000
# Says a byte on the serial console, counts in its memory until one is typed there, and powers off.
COUNTS = (
    bytes([0x66, 0xBA, 0xF8, 0x03, 0xEE])
    + bytes([0xFF, 0x05])
    + struct.pack("<I", COUNTER)
    + bytes([0x66, 0xBA, 0xFD, 0x03, 0xEC, 0xA8, 0x01, 0x74, 0xF1])
    + POWEROFF
)


@pytest.fixture
def spec(host: Host, tmp_path: Path) -> MachineSpec:
    return tiny_spec(host, tmp_path, COUNTS)


@pytest.fixture
def into(host: Host, spec: MachineSpec) -> Path:
    """The directory of a checkpoint, in RAM."""
    directory = spec.memory_file.parent / "copy"
    directory.mkdir(parents=True, mode=0o700)
    return directory


@asynccontextmanager
async def nobody() -> AsyncIterator[Callable[[], tuple[int, int]]]:
    """Holds the channel of a machine without an agent."""
    yield lambda: (0, 0)


def clone(spec: MachineSpec, name: str, template: Template, **other: Any) -> MachineSpec:
    return msgspec.structs.replace(
        spec,
        directory=spec.directory.with_name(name),
        memory_file=spec.memory_file.with_name(f"{name}.mem"),
        tag=f"{spec.tag}{name}",
        template=template,
        **other,
    )


async def launch(host: Host, qemu: QemuHypervisor, spec: MachineSpec) -> Identity:
    """Launches a machine and waits until it has left the firmware, as a guest with an agent has."""
    identity = await qemu.launch(spec)
    with host.watches.open(spec.console_path) as watch:
        while not host.files.size(spec.console_path):
            await watch.wait()
    return identity


async def ends_when_typed_to(host: Host, spec: MachineSpec, machine: Machine) -> bool:
    async with host.files.open_fifo(spec.console_input_path) as keyboard:
        await keyboard.send_all(b"x")
        return (await machine.ended()).kind is EndKind.SHUTDOWN


async def memory_of(machine: Machine, size: int, path: Path) -> bytes:
    """Returns the guest's memory without the range of the ROMs."""
    assert isinstance(machine, QemuMachine)
    assert machine._qmp is not None
    await machine._qmp.execute("pmemsave", {"val": 0, "size": size, "filename": str(path)})
    return without_roms(path)


def without_roms(path: Path) -> bytes:
    data = path.read_bytes()
    return data[:0xA0000] + data[0x100000:]


async def test_copies_of_copies_have_the_machines_contents(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, into: Path
) -> None:
    """A machine that booted, one that goes on from its copy, and one that goes on from that one's; the files that they
    map have lost their names."""
    size = spec.memory_mb * 1024 * 1024
    running = spec
    with trio.fail_after(90):
        for number in range(3):
            identity = await (qemu.launch(running) if number else launch(host, qemu, running))
            async with qemu.attach(running, identity) as machine:
                await host.files.remove_tree(into)
                await host.files.mkdir(into)
                await machine.pause()
                checkpoint = await machine.checkpoint(into, hold=nobody)
                assert checkpoint.paused_s == 0.0
                assert await machine.status() == "paused"
                assert without_roms(checkpoint.template.memory) == await memory_of(machine, size, into / "seen")
                assert checkpoint.template.memory.stat().st_mode & 0o777 == 0o600
                assert checkpoint.memory_bytes < size // 4
                await machine.resume()
                assert await ends_when_typed_to(host, running, machine), number
                await machine.quit()
            running = clone(spec, f"c{number}", checkpoint.template)


async def test_a_machine_runs_on_after_each_of_many_checkpoints(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, into: Path
) -> None:
    with trio.fail_after(60):
        identity = await launch(host, qemu, spec)
        async with qemu.attach(spec, identity) as machine:
            for number in range(3):
                directory = into / str(number)
                directory.mkdir()
                checkpoint = await machine.checkpoint(directory, hold=nobody)
                assert await machine.status() == "running"
                assert checkpoint.paused_s > 0.0
                assert (checkpoint.state_bytes, checkpoint.layer) == (checkpoint.template.state.stat().st_size, None)
            copy = clone(spec, "c", checkpoint.template)
            async with qemu.attach(copy, await qemu.launch(copy)) as other:
                assert await other.status() == "running"
                assert await ends_when_typed_to(host, copy, other)
            assert await ends_when_typed_to(host, spec, machine)


async def test_a_disk_is_copied_as_it_is(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, into: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(os.urandom(1024 * 1024))
    written, read = (
        VolumeDisk(tmp_path / f"{name}.img", f"vol-{name}", read_only=name == "read") for name in ("written", "read")
    )
    for volume in (written, read):
        volume.path.write_bytes(os.urandom(1024 * 1024))
    spec = msgspec.structs.replace(spec, root=Disk(base, tmp_path / "root.qcow2"), volumes=(written, read))
    assert spec.root is not None
    with trio.fail_after(60):
        await qemu.make_layer(spec.root)
        identity = await launch(host, qemu, spec)
        async with qemu.attach(spec, identity) as machine:
            copied = into / "volumes"
            copied.mkdir()
            checkpoint = await machine.checkpoint(into, hold=nobody, volumes=copied)
            assert checkpoint.layer == into / "root.qcow2"
            assert checkpoint.layer_bytes > 0
            assert checkpoint.layer.read_bytes() == spec.root.layer.read_bytes()
            # A volume that is only read can't change: it is shared.
            assert checkpoint.volumes == (written.path.name,)
            assert [path.name for path in copied.iterdir()] == [written.path.name]
            assert (copied / written.path.name).read_bytes() == written.path.read_bytes()
            disk = Disk(base, tmp_path / "copy.qcow2")
            await qemu.make_layer(disk, checkpoint.layer)
            volumes = (VolumeDisk(copied / written.path.name, written.serial), read)
            copy = clone(spec, "c", checkpoint.template, root=disk, volumes=volumes)
            async with qemu.attach(copy, await qemu.launch(copy)) as other:
                assert await ends_when_typed_to(host, copy, other)
            assert await ends_when_typed_to(host, spec, machine)


class FaultyHost(Host, LinuxFiles):
    """A host whose copying fails or hangs; `copying` is set when it begins."""

    def __init__(self, error: OSError | None) -> None:
        Host.__init__(self)
        LinuxFiles.__init__(self, self.own)
        self.files = self
        self.copying = trio.Event()
        self._error = error

    async def copy(self, source: Path, target: Path, mode: int = 0o600) -> None:
        self.copying.set()
        if self._error is not None:
            raise self._error
        await trio.sleep_forever()


@pytest.fixture
async def launched(host: Host, qemu: QemuHypervisor, spec: MachineSpec) -> Identity:
    return await launch(host, qemu, spec)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "no space left"), "no_space"),
        (PermissionError(errno.EPERM, "not permitted"), "not_permitted"),
        (OSError(errno.EIO, "input/output error"), "io_error"),
        (None, "too_slow"),
    ],
)
async def test_after_a_failed_checkpoint_the_guest_runs_on(
    tmp_path: Path, spec: MachineSpec, launched: Identity, into: Path, error: OSError | None, code: str
) -> None:
    qemu = QemuHypervisor(FaultyHost(error), tmp_path / "cache", accelerator="tcg")
    with trio.fail_after(30):
        async with qemu.attach(spec, launched) as machine:
            with pytest.raises(CheckpointFailed) as caught:
                await machine.checkpoint(into, hold=nobody, timeout_s=1.0)
            assert caught.value.code == code, caught.value
            assert await machine.status() == "running"


async def test_after_an_unwritable_state_the_guest_runs_on(
    qemu: QemuHypervisor, spec: MachineSpec, launched: Identity, into: Path
) -> None:
    with trio.fail_after(30):
        async with qemu.attach(spec, launched) as machine:
            with pytest.raises(CheckpointFailed) as caught:
                await machine.checkpoint(into / "nowhere", hold=nobody)
            assert caught.value.code == "io_error", caught.value
            assert await machine.status() == "running"
            await machine.checkpoint(into, hold=nobody)


async def test_a_cancelled_checkpoint_resumes_the_guest(
    tmp_path: Path, spec: MachineSpec, launched: Identity, into: Path
) -> None:
    host = FaultyHost(None)
    qemu = QemuHypervisor(host, tmp_path / "cache", accelerator="tcg")
    with trio.fail_after(30):
        async with qemu.attach(spec, launched) as machine:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(partial(machine.checkpoint, into, hold=nobody))
                await host.copying.wait()
                assert await machine.status() == "paused"
                nursery.cancel_scope.cancel()
            assert await machine.status() == "running"
            await machine.pause(timeout_s=1.0)


async def test_a_guest_that_cannot_be_resumed_is_resumed_later(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, launched: Identity, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hypervisor hangs for a while."""
    monkeypatch.setattr("volant.hypervisor.qemu._checkpoint.RESUME_S", 0.2)
    monkeypatch.setattr("volant.hypervisor.qemu._machine._UNDO_RETRY_S", 0.1)
    with trio.fail_after(40), host.processes.open(launched) as process:

        @asynccontextmanager
        async def hangs_in_the_end() -> AsyncIterator[Callable[[], tuple[int, int]]]:
            turns = iter((0, 1, 2))

            def on_the_way() -> tuple[int, int]:
                if next(turns, None) is None:
                    process.kill(signal.SIGSTOP)
                return 0, 0

            yield on_the_way

        async with qemu.attach(spec, launched) as machine:
            await machine.pause()
            await machine.resume()
            with pytest.raises(CheckpointFailed) as caught:
                await machine.checkpoint(into, hold=hangs_in_the_end, timeout_s=2.0)
            assert caught.value.code == "guest_stopped", caught.value
            process.kill(signal.SIGCONT)
            while await machine.status() != "running":  # noqa: ASYNC110 - it is being tried
                await trio.sleep(0.05)
            await machine.pause()
            assert await machine.status() == "paused"


async def test_a_hypervisor_killed_during_a_checkpoint_is_reported(
    tmp_path: Path, spec: MachineSpec, launched: Identity, into: Path
) -> None:
    host = FaultyHost(None)
    qemu = QemuHypervisor(host, tmp_path / "cache", accelerator="tcg")
    with trio.fail_after(30):
        async with qemu.attach(spec, launched) as machine, trio.open_nursery() as nursery:

            async def kill() -> None:
                await host.copying.wait()
                await machine.kill()

            nursery.start_soon(kill)
            with pytest.raises(CheckpointFailed):
                await machine.checkpoint(into, hold=nobody, timeout_s=2.0)


async def test_a_guest_that_has_ended_has_no_checkpoint(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, launched: Identity, into: Path
) -> None:
    with trio.fail_after(30):
        async with qemu.attach(spec, launched) as machine:
            assert await ends_when_typed_to(host, spec, machine)
            with pytest.raises(CheckpointFailed, match="shutdown") as caught:
                await machine.checkpoint(into, hold=nobody)
            assert caught.value.code == "refused"


async def test_an_agent_port_that_does_not_become_idle_is_reported(
    qemu: QemuHypervisor, spec: MachineSpec, launched: Identity, into: Path
) -> None:
    taken = iter(range(10**9))

    @asynccontextmanager
    async def restless() -> AsyncIterator[Callable[[], tuple[int, int]]]:
        yield lambda: (0, next(taken))

    with trio.fail_after(30):
        async with qemu.attach(spec, launched) as machine:
            with pytest.raises(CheckpointFailed, match="become idle"):
                await machine.checkpoint(into, hold=restless)
            assert await machine.status() == "running"
