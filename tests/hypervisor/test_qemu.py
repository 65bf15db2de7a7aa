"""The driver with the real QEMU and guests of a few bytes: how machines start and end."""

from __future__ import annotations

import os
import shutil
import signal
import stat
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.hypervisor.kit import POWEROFF, RESET, kernel, tiny_spec
from volant.host import LOG_LIMIT, PROGRAM_ENVIRONMENT, Host
from volant.hypervisor import Disk, HypervisorError, LaunchFailed, Machine, MachineSpec, Nic, ParkedControl
from volant.hypervisor.qemu import QemuHypervisor, _probe
from volant.hypervisor.qemu._argv import build_argv
from volant.hypervisor.qemu._launch import classify
from volant.model import EndKind

pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]


@pytest.fixture
def spec(host: Host, tmp_path: Path) -> MachineSpec:
    return tiny_spec(host, tmp_path, directory=tmp_path / ("deep" * 30) / "7")


async def test_a_machine_is_launched_attached_and_killed(host: Host, qemu: QemuHypervisor, spec: MachineSpec) -> None:
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        assert await host.processes.find(spec.tag) == identity
        for path, mode in ((spec.directory, 0o700), (spec.memory_file, 0o600), (spec.log_path, 0o600)):
            assert stat.S_IMODE((await trio.Path(path).stat()).st_mode) == mode, path
        async with qemu.attach(spec, identity) as machine:
            assert await machine.status() == "running"
            end = await machine.kill()
            assert (end.kind, end.exit_status) == (EndKind.KILLED, -signal.SIGKILL)
            assert await machine.ended() == end
        assert await host.processes.find(spec.tag) is None
        async with qemu.attach(spec, identity) as machine:
            assert (await machine.ended()).kind is EndKind.GONE
            with pytest.raises(HypervisorError):
                await machine.status()


@pytest.mark.parametrize(
    ("code", "kind", "adopted_kind"),
    [
        (POWEROFF, EndKind.SHUTDOWN, EndKind.SHUTDOWN),
        (RESET, EndKind.RESET, EndKind.SHUTDOWN),
    ],
)
async def test_how_a_guest_ended_is_reported_also_to_a_later_daemon(
    qemu: QemuHypervisor, spec: MachineSpec, code: bytes, kind: EndKind, adopted_kind: EndKind
) -> None:
    await trio.Path(spec.kernel).write_bytes(kernel(delayed(code)))
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        async with qemu.attach(spec, identity) as machine:
            assert (await machine.ended()).kind is kind
        async with qemu.attach(spec, identity) as machine:
            assert (await machine.ended()).kind is adopted_kind
            end = await machine.quit()
            assert (end.kind, end.exit_status) == (EndKind.EXITED, 0)


async def parked(machine: Machine) -> ParkedControl:
    """Parks the connection once no command is being written: an event of QEMU's makes the daemon ask for the state."""
    while (control := machine.park()) is None:  # noqa: ASYNC110 - nothing tells
        await trio.sleep(0.001)
    return control


async def test_a_parked_connection_resumes_a_guest_and_is_attached_again(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec
) -> None:
    with trio.fail_after(60):
        identity = await qemu.launch(spec)
        async with qemu.attach(spec, identity) as machine:
            await machine.pause()
            control = await parked(machine)
        await qemu.resume_warm(spec, control)
        async with qemu.attach(spec, identity, control) as machine:
            assert await machine.status() == "running"
            await machine.pause()
            control = await parked(machine)
        with host.processes.open(identity) as process:
            process.kill()
            await process.wait()
        with pytest.raises(HypervisorError):
            await qemu.resume_warm(spec, control)
        async with qemu.attach(spec, identity, control) as machine:
            assert (await machine.ended()).kind is EndKind.KILLED


def delayed(code: bytes) -> bytes:
    """Counts for a while, so that the test can attach first."""
    return bytes([0xB9]) + struct.pack("<I", 0x0FFFFFFF) + bytes([0x49, 0x75, 0xFD]) + code


async def test_a_killed_process_is_reported(host: Host, qemu: QemuHypervisor, spec: MachineSpec) -> None:
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        async with qemu.attach(spec, identity) as machine:
            with host.processes.open(identity) as process:
                process.kill()
            end = await machine.ended()
            assert end.kind is EndKind.KILLED
            assert "signal 9" in end.message


async def test_a_paused_guest_has_not_ended_and_a_later_daemon_can_resume_it(
    qemu: QemuHypervisor, spec: MachineSpec
) -> None:
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        async with qemu.attach(spec, identity) as machine:
            for _ in range(2):
                await machine.pause()
                assert await machine.status() == "paused"
            with trio.move_on_after(0.3):
                await machine.ended()
                raise AssertionError("a pause was taken for an end")
        async with qemu.attach(spec, identity) as machine:
            assert await machine.status() == "paused"
            for _ in range(2):
                await machine.resume()
                assert await machine.status() == "running"
            await machine.pause()
            await machine.kill()
            with pytest.raises(HypervisorError):
                await machine.pause()


async def test_a_guest_that_has_ended_can_t_be_paused(qemu: QemuHypervisor, spec: MachineSpec) -> None:
    await trio.Path(spec.kernel).write_bytes(kernel(delayed(POWEROFF)))
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        async with qemu.attach(spec, identity) as machine:
            await machine.ended()
            with pytest.raises(HypervisorError, match="'shutdown'"):
                await machine.pause()
            await machine.resume()
            assert await machine.status() == "shutdown"


async def test_exceptions_in_the_block_are_not_wrapped(qemu: QemuHypervisor, spec: MachineSpec) -> None:
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        with pytest.raises(KeyError):
            async with qemu.attach(spec, identity):
                raise KeyError
        async with qemu.attach(spec, identity) as machine:
            assert await machine.status() == "running"


async def test_a_second_attachment_is_refused(
    qemu: QemuHypervisor, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volant.hypervisor.qemu._machine.ATTACH_S", 0.3)
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        async with qemu.attach(spec, identity) as machine:
            with pytest.raises(HypervisorError, match="does not answer"):
                async with qemu.attach(spec, identity):
                    pass
            assert await machine.status() == "running"


async def test_attaching_to_another_machines_socket_fails(qemu: QemuHypervisor, spec: MachineSpec) -> None:
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        other = msgspec.structs.replace(spec, tag="volant-test-other")
        with pytest.raises(HypervisorError, match="another machine"):
            async with qemu.attach(other, identity):
                pass


async def test_attaching_waits_until_the_process_listens(qemu: QemuHypervisor, spec: MachineSpec) -> None:
    """The daemon was killed just after it had started the process."""
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        hidden = spec.control_path.with_name("later")
        spec.control_path.rename(hidden)

        async def listen() -> None:
            await trio.sleep(0.2)
            os.link(hidden, spec.control_path)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            async with qemu.attach(spec, identity) as machine:
                assert await machine.status() == "running"
        # A process that ends instead ends the wait.
        spec.control_path.unlink()

        async def end() -> None:
            await trio.sleep(0.2)
            os.kill(identity.pid, signal.SIGKILL)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            async with qemu.attach(spec, identity) as machine:
                assert (await machine.ended()).kind is EndKind.KILLED


async def test_qemus_own_log_is_limited(host: Host, qemu: QemuHypervisor, spec: MachineSpec) -> None:
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        async with qemu.attach(spec, identity):
            async with await trio.open_file(spec.log_path, "ab") as file:
                await file.write(bytes(LOG_LIMIT + 1))
            while host.files.size(spec.log_path) > LOG_LIMIT:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)


async def test_a_qemu_that_logs_all_the_time_is_trimmed_now_and_then(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volant.host._programs.LOG_PAUSE_S", 0.5)
    real, looks = host.files.empty_if_larger, 0

    async def empty_if_larger(path: Path, limit: int) -> bool:
        nonlocal looks
        looks += 1
        return await real(path, limit)

    monkeypatch.setattr(host.files, "empty_if_larger", empty_if_larger)
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        async with qemu.attach(spec, identity):
            began = trio.current_time()
            async with await trio.open_file(spec.log_path, "ab") as file:
                while trio.current_time() < began + 1.5:
                    await file.write(b"once more\n")
                    await file.flush()
                await file.write(bytes(LOG_LIMIT))
            assert 1 <= looks <= 1 + (trio.current_time() - began) / 0.5 + 1
            while host.files.size(spec.log_path) > LOG_LIMIT:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.01)


async def test_console_input_reaches_the_guest_s_port_after_its_writer_was_replaced(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec
) -> None:
    """The guest echoes its input; two writers open and close the pipe."""
    echo = bytes.fromhex("66bafd03 ec a801 74f7 66baf803 ec ee ebef")  # wait for the port; read; write; again
    await trio.Path(spec.kernel).write_bytes(kernel(echo))
    with trio.fail_after(20):
        await qemu.launch(spec)
        with host.watches.open(spec.console_path) as watch:
            for number, text in enumerate((b"one", b"two"), 1):
                fd = host.descriptors.open(spec.console_input_path, os.O_WRONLY | os.O_NONBLOCK)
                host.descriptors.write(fd, text)
                host.descriptors.close(fd)
                while len(await host.files.read(spec.console_path)) < 3 * number:
                    await watch.wait()
        assert await host.files.read(spec.console_path) == b"onetwo"


async def test_without_qemu_the_error_says_so(host: Host, spec: MachineSpec, tmp_path: Path) -> None:
    qemu = QemuHypervisor(host, tmp_path / "cache", program="no-such-qemu")
    choice = await qemu.choice()
    assert (choice.accelerator, choice.version) == ("tcg", None)
    assert "not installed" in choice.reason
    with pytest.raises(LaunchFailed, match="not installed") as failure:
        await qemu.launch(spec)
    assert failure.value.code == "qemu_missing"


@pytest.mark.parametrize("what", ["kernel", "initramfs"])
async def test_a_missing_image_is_named(qemu: QemuHypervisor, spec: MachineSpec, what: str) -> None:
    await trio.Path(getattr(spec, what)).unlink()
    with pytest.raises(LaunchFailed, match=f"the {what} .* is missing") as failure:
        await qemu.launch(spec)
    assert failure.value.code == "bad_image"


async def test_a_file_that_is_not_a_kernel_is_a_bad_image(host: Host, qemu: QemuHypervisor, spec: MachineSpec) -> None:
    await trio.Path(spec.kernel).write_bytes(b"")
    with trio.fail_after(20):
        with pytest.raises(LaunchFailed) as failure:
            await qemu.launch(spec)
    assert failure.value.code == "bad_image", failure.value.message
    assert await host.processes.find(spec.tag) is None
    assert not host.files.exists(spec.memory_file)


async def test_memory_that_the_host_lacks_is_refused(qemu: QemuHypervisor, spec: MachineSpec) -> None:
    with pytest.raises(LaunchFailed, match="MiB of memory left") as failure:
        await qemu.launch(msgspec.structs.replace(spec, memory_mb=1024 * 1024))
    assert failure.value.code == "memory_refused"
    assert not await trio.Path(spec.memory_file).exists()


async def test_memory_that_the_file_system_lacks_is_refused(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(path: Path, size: int, mode: int = 0o600, *, reserve: bool = True) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(host.disk, "allocate", full)
    with pytest.raises(LaunchFailed, match="no space for 64 MiB") as failure:
        await qemu.launch(spec)
    assert failure.value.code == "memory_refused"


@pytest.mark.parametrize("what", ["MiB of memory left", "no space for 64 MiB"])
async def test_memory_that_other_guests_gave_back_stays_reserved(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    short = what == "MiB of memory left"
    monkeypatch.setattr(host.machine, "memory_available_mb", lambda: 1024 + (128 if short else 1024))
    monkeypatch.setattr(host.disk, "free", lambda path: 2**31 if short else 2**30 - 1)
    await host.files.mkdir(spec.memory_file.parent)
    await host.disk.allocate(spec.memory_file.with_name("other.mem"), 2**30, reserve=False)
    with pytest.raises(LaunchFailed, match=what) as failure:
        await qemu.launch(spec)
    assert failure.value.code == "memory_refused"
    assert not host.files.exists(spec.memory_file)


async def test_the_error_quotes_a_qemu_that_exits(host: Host, spec: MachineSpec, tmp_path: Path) -> None:
    program = script(tmp_path, "echo something odd >&2; exit 3")
    with trio.fail_after(10):
        with pytest.raises(LaunchFailed, match="exited with 3: something odd") as failure:
            await QemuHypervisor(host, tmp_path / "cache", accelerator="tcg", program=program).launch(spec)
    assert failure.value.code == "exited"
    await host.files.remove_tree(spec.memory_file.parent)


async def test_a_qemu_that_hangs_is_killed(
    host: Host, spec: MachineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volant.hypervisor.qemu._launch.LAUNCH_S", 0.3)
    program = script(tmp_path, "sleep 60")
    with trio.fail_after(10):
        with pytest.raises(LaunchFailed, match="did not answer") as failure:
            await QemuHypervisor(host, tmp_path / "cache", accelerator="tcg", program=program).launch(spec)
    assert failure.value.code == "no_answer"
    assert await host.processes.find(spec.tag) is None
    await host.files.remove_tree(spec.memory_file.parent)


def script(directory: Path, body: str) -> str:
    path = directory / "qemu"
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && {{ echo QEMU emulator version 10.0.13; exit; }}\n{body}\n')
    path.chmod(0o755)
    return str(path)


async def test_the_probes_guest_runs_where_a_guest_can_run(host: Host, tmp_path: Path) -> None:
    """On TCG, which runs any guest: so a failure under KVM is KVM's."""
    (tmp_path / "guest.elf").write_bytes(_probe.probe_kernel())
    argv = ["qemu-system-x86_64", "-machine", "q35", "-accel", "tcg", "-cpu", "max", "-m", "64M", "-nodefaults"]
    argv += ["-display", "none", "-no-reboot", "-kernel", "guest.elf"]
    argv += ["-device", f"isa-debug-exit,iobase={_probe.EXIT_PORT:#x},iosize=4"]
    status, output = await host.processes.run(argv, env=PROGRAM_ENVIRONMENT, cwd=tmp_path, timeout_s=20)
    assert (status, output) == (_probe.EXIT_STATUS, b"")


async def test_the_accelerator_is_chosen_once_and_cached(host: Host, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = await QemuHypervisor(host, cache).choice()
    assert first.version is not None
    if not host.files.exists(Path("/dev/kvm")):
        assert (first.accelerator, first.reason) == ("tcg", "there is no /dev/kvm")
        return
    assert host.files.names(cache) == ["accelerator.json"]
    kept = await host.files.read(cache / "accelerator.json")
    await host.files.write(cache / "accelerator.json", kept.replace(first.reason.encode(), b"remembered"))
    assert (await QemuHypervisor(host, cache).choice()).reason == "remembered"
    await host.files.write(cache / "accelerator.json", kept.replace(first.version.encode(), b"0.1"))
    assert (await QemuHypervisor(host, cache).choice()) == first
    assert (await QemuHypervisor(host, cache, accelerator="kvm").choice()).accelerator == "kvm"


@pytest.mark.parametrize("kept", [b"{", b'{"kernel":"\xff"}'])
async def test_a_damaged_choice_of_the_accelerator_is_made_again(host: Host, tmp_path: Path, kept: bytes) -> None:
    (tmp_path / "accelerator.json").write_bytes(kept)
    assert (await QemuHypervisor(host, tmp_path).choice()).version is not None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("qemu-system-x86_64: cannot set up guest memory 'memory0': Cannot allocate memory", "memory_refused"),
        ("Could not access KVM kernel module: Permission denied", "kvm_unavailable"),
        ("qemu: could not open kernel file 'x': No such file", "bad_image"),
        ("qemu: linux kernel too old to load a ram disk", "bad_image"),
        ("Address already in use", "exited"),
        ("", "exited"),
    ],
)
def test_qemus_last_output_is_classified(text: str, code: str) -> None:
    assert classify(text) == code


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
async def test_qemu_has_the_machine_types_of_both_accelerators(
    qemu: QemuHypervisor, spec: MachineSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, accelerator: str
) -> None:
    """Tests microvm's devices on TCG, as KVM may be missing. (Linux on it would need a TSC, which TCG lacks.)"""

    def on_tcg(spec: MachineSpec, version: tuple[int, int], program: str, **more: Any) -> list[str]:
        argv = build_argv(msgspec.structs.replace(spec, accelerator=accelerator), version, program, **more)
        argv[argv.index("-accel") + 1] = "tcg"
        argv[argv.index("-cpu") + 1] = "max"
        return argv

    monkeypatch.setattr("volant.hypervisor.qemu._launch.build_argv", on_tcg)
    root = Disk(tmp_path / "base", tmp_path / "root.qcow2")
    await trio.Path(tmp_path / "base").write_bytes(bytes(2**20))
    await qemu.make_layer(root)
    spec = msgspec.structs.replace(spec, root=root, nic=Nic(mac="02:00:00:00:00:07"), balloon=True)
    with trio.fail_after(20):
        identity = await qemu.launch(spec)
        async with qemu.attach(spec, identity) as machine:
            assert await machine.status() == "running"
