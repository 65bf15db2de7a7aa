"""A saved machine can be cloned any number of times, and no clone changes its template."""

from __future__ import annotations

import hashlib
import shutil
import struct
from pathlib import Path

import msgspec
import pytest
import trio

from tests.hypervisor.kit import POWEROFF, tiny_spec
from volant.host import Host
from volant.hypervisor import HypervisorError, LaunchFailed, Machine, MachineSpec, Template
from volant.hypervisor.qemu import QemuHypervisor
from volant.hypervisor.qemu._machine import QemuMachine
from volant.model import EndKind

pytestmark = [
    pytest.mark.programs,
    pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="QEMU is not installed"),
]

# Waits for a byte that is typed on the serial console, writes to its memory and powers off: it ends where somebody
# wants it to, in the template or in a clone.
ONE_WORD = bytes([0xC7, 0x05]) + struct.pack("<II", 0x120000, 0x55AA55AA)
UNTIL_TYPED = bytes([0x66, 0xBA, 0xFD, 0x03, 0xEC, 0xA8, 0x01, 0x74, 0xF7]) + ONE_WORD + POWEROFF


@pytest.fixture
def spec(host: Host, tmp_path: Path) -> MachineSpec:
    return tiny_spec(host, tmp_path, UNTIL_TYPED, name="", in_background=True)


async def saved(qemu: QemuHypervisor, spec: MachineSpec, tmp_path: Path) -> Template:
    identity = await qemu.launch(spec)
    async with qemu.attach(spec, identity) as machine:
        await machine.save(tmp_path / "state")
        await machine.quit()
    return Template(spec.memory_file, tmp_path / "state")


def clone(spec: MachineSpec, number: int, template: Template) -> MachineSpec:
    return msgspec.structs.replace(
        spec,
        name=f"clone{number}",
        directory=spec.directory.with_name(f"c{number}"),
        memory_file=spec.memory_file.with_name(f"{number}.mem"),
        tag=f"{spec.tag}-{number}",
        template=template,
        in_background=False,
    )


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


async def test_clones_run_and_do_not_change_their_template(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, tmp_path: Path
) -> None:
    with trio.fail_after(60):
        template = await saved(qemu, spec, tmp_path)
        before = digest_of(template.memory)
        for number in (1, 2):
            machine_spec = clone(spec, number, template)
            identity = await qemu.launch(machine_spec)
            assert not machine_spec.memory_file.exists()
            async with qemu.attach(machine_spec, identity) as machine:
                assert await machine.status() == "running"
                async with host.files.open_fifo(machine_spec.console_input_path) as keyboard:
                    await keyboard.send_all(b"x")
                    assert (await machine.ended()).kind is EndKind.SHUTDOWN
                await machine.quit()
        assert digest_of(template.memory) == before


@pytest.mark.parametrize("what", ["empty", "cut off", "of another size", "missing"])
async def test_an_incompatible_template_is_refused_and_no_process_is_left(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, tmp_path: Path, what: str
) -> None:
    with trio.fail_after(60):
        template = await saved(qemu, spec, tmp_path)
        wanted = clone(spec, 1, template)
        if what == "of another size":
            wanted = msgspec.structs.replace(wanted, memory_mb=96)
        elif what == "missing":
            template.memory.unlink()
        else:
            data = template.state.read_bytes()
            template.state.write_bytes(b"" if what == "empty" else data[: len(data) // 2])
        with pytest.raises(LaunchFailed) as caught:
            await qemu.launch(wanted)
        assert caught.value.code == "template_refused", caught.value
        assert await host.processes.find(wanted.tag) is None


async def test_a_failed_save_is_reported(qemu: QemuHypervisor, spec: MachineSpec, tmp_path: Path) -> None:
    with trio.fail_after(60):
        identity = await qemu.launch(spec)
        async with qemu.attach(spec, identity) as machine:
            with pytest.raises(HypervisorError):
                await machine.save(tmp_path / "nowhere" / "state")
            await machine.kill()


async def test_a_machine_with_a_connected_agent_is_not_saved(
    host: Host, qemu: QemuHypervisor, spec: MachineSpec, tmp_path: Path
) -> None:
    """QEMU would still write to its memory, for example when the client disconnects."""
    with trio.fail_after(60):
        identity = await qemu.launch(spec)
        async with qemu.attach(spec, identity) as machine:
            async with await host.sockets.connect_unix(spec.agent_path, 5):
                await until_qemu_has_noticed(machine)
                with pytest.raises(HypervisorError, match="agent's port"):
                    await machine.save(tmp_path / "state")
                assert await machine.status() == "running"
            await machine.save(tmp_path / "state")
            await machine.quit()


async def until_qemu_has_noticed(machine: Machine) -> None:
    """Returns when QEMU has accepted the connection to the agent's port; the kernel accepts it earlier."""
    assert isinstance(machine, QemuMachine)
    while any(  # noqa: ASYNC110 - QEMU has no event for it, and the caller has a deadline
        each["label"] == "agent" and each["filename"].startswith("disconnected:")
        for each in await machine._execute("query-chardev")
    ):
        await trio.sleep(0.01)
