"""A checkpoint runs under a later QEMU that still has its machine type, and is refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import trio

from tests.hypervisor.kit import real_qemu, tiny_spec
from tests.hypervisor.test_checkpoint import COUNTS, clone, ends_when_typed_to, launch, nobody
from volant.host import Host
from volant.hypervisor import MachineKind, MachineSpec
from volant.hypervisor.qemu import QemuHypervisor, _launch
from volant.hypervisor.qemu._argv import FORMAT, WITH_HPET, format_of
from volant.hypervisor.qemu._compatibility import HEAD_BYTES, incompatibility, machine_of, parse_machines
from volant.hypervisor.qemu._migration import complete

HERE = MachineKind(version="10.0.13", accelerator="tcg", machine="pc-q35-10.0", devices=FORMAT, tsc_khz=2_600_000)
KVM = msgspec.structs.replace(HERE, accelerator="kvm", machine="microvm")
KNOWN = {"microvm", "pc-q35-9.2", "pc-q35-10.0"}
EMPTY = b"QEVM\0\0\0\3"


@pytest.mark.parametrize(
    ("saved", "here", "why"),
    [
        (HERE, HERE, None),
        (msgspec.structs.replace(HERE, version="9.2.4", machine="pc-q35-9.2"), HERE, None),
        # A machine that was adopted from an older QEMU keeps its type.
        (msgspec.structs.replace(HERE, machine="pc-q35-9.2"), HERE, None),
        (msgspec.structs.replace(HERE, version="10.0.2"), HERE, None),
        (
            msgspec.structs.replace(HERE, version="2.12.1", machine="pc-q35-2.12"),
            HERE,
            "no longer has its machine type",
        ),
        (msgspec.structs.replace(HERE, version="10.1.0"), HERE, "an older one, 10.0.13"),
        (HERE, msgspec.structs.replace(HERE, version="9.2.4"), "an older one, 9.2.4"),
        (msgspec.structs.replace(HERE, devices=WITH_HPET), HERE, None),
        (
            msgspec.structs.replace(HERE, devices=WITH_HPET - 1),
            HERE,
            f"and this version of Volant uses format {FORMAT}",
        ),
        (msgspec.structs.replace(HERE, devices=FORMAT + 1), HERE, f"have format {FORMAT + 1}"),
        (msgspec.structs.replace(HERE, tsc_khz=0), HERE, None),
        (HERE, msgspec.structs.replace(HERE, tsc_khz=2_600_900), None),
        (HERE, msgspec.structs.replace(HERE, tsc_khz=2_450_000), "runs at 2600000 kHz, and here it is 2450000 kHz"),
        (HERE, msgspec.structs.replace(HERE, tsc_khz=0), "runs at 2600000 kHz, and here it is 0 kHz"),
        (HERE, KVM, "under TCG, and guests use KVM here"),
        (KVM, KVM, None),
        (KVM, msgspec.structs.replace(KVM, version="10.0.14"), "needs the same version"),
    ],
)
def test_compatibility_follows_qemus_promises(saved: MachineKind, here: MachineKind, why: str | None) -> None:
    found = incompatibility(saved, here, KNOWN)
    assert found is None if why is None else why in (found or "")


def test_the_machine_type_is_read_from_the_head_of_a_stream() -> None:
    assert machine_of(complete(EMPTY, "pc-q35-9.2")[:HEAD_BYTES]) == "pc-q35-9.2"
    assert machine_of(complete(EMPTY, "pc-q35-4.0.1")) == "pc-q35-4.0.1"
    for other in ("microvm", "pc-q35-9.2,accel=kvm", "q35", "pc-q35-9.2\n", ""):
        assert machine_of(complete(EMPTY, other)) is None, other
    for damaged in (b"", EMPTY, b"{}", complete(EMPTY, "pc-q35-9.2")[1:], b"QEVM\0\0\0\3\7\1\0\0\12pc-q35-9.2"):
        assert machine_of(damaged) is None, damaged


async def test_a_copy_of_an_older_machine_keeps_its_type(host: Host, qemu: QemuHypervisor, tmp_path: Path) -> None:
    """As after an upgrade of QEMU. The same program acts as the older one, as it has the older machine type."""
    with trio.fail_after(90):
        choice = await qemu.choice()
        spec: MachineSpec = tiny_spec(host, tmp_path, COUNTS)
        status, listing = await host.processes.run(
            ["qemu-system-x86_64", "-machine", "help"], env={"PATH": "/usr/bin:/bin"}, cwd=tmp_path, timeout_s=10
        )
        assert status == 0
        machines = parse_machines(listing)
        old = next(name for name in ("pc-q35-9.2", "pc-q35-9.0", "pc-q35-8.2", "pc-q35-7.2") if name in machines)
        major, minor = map(int, old.removeprefix("pc-q35-").split("."))
        before = QemuHypervisor(host, tmp_path / "cache", accelerator="tcg")
        await before.choice()
        before._version = (major, minor, f"{major}.{minor}.0")
        running, hypervisor = spec, before
        try:
            for number in range(2):
                identity = await (hypervisor.launch(running) if number else launch(host, hypervisor, running))
                assert any(word.startswith(f"{old},") for word in host.proc.command_line(identity))
                into = spec.memory_file.parent / str(number)
                await host.files.mkdir(into)
                async with hypervisor.attach(running, identity) as machine:
                    checkpoint = await machine.checkpoint(into, hold=nobody)
                    assert (checkpoint.kind.machine, checkpoint.kind.version) == (old, choice.version)
                    assert await ends_when_typed_to(host, running, machine)
                    await machine.quit()
                assert await qemu.incompatibility(checkpoint.kind) is None
                gone = msgspec.structs.replace(checkpoint.kind, machine="pc-q35-1.4")
                assert "no longer has its machine type pc-q35-1.4" in (await qemu.incompatibility(gone) or "")
                running, hypervisor = clone(running, f"u{number}", checkpoint.template), qemu
        finally:
            for found in await host.processes.scan(spec.tag):
                with host.processes.open(found) as process:
                    process.kill()
            await host.files.remove_tree(spec.memory_file.parent)


async def test_a_copy_of_a_machine_with_an_hpet_has_one(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of one that an earlier version launched: new machines have none."""
    running: MachineSpec = tiny_spec(host, tmp_path, COUNTS)
    with trio.fail_after(90):
        async with real_qemu(host, running, tmp_path / "cache") as qemu:
            for number in range(3):
                with monkeypatch.context() as before:
                    if not number:
                        before.setattr(_launch, "FORMAT", WITH_HPET)
                    identity = await (qemu.launch(running) if number else launch(host, qemu, running))
                assert format_of(host.proc.command_line(identity)) == WITH_HPET
                into = running.memory_file.parent / str(number)
                await host.files.mkdir(into)
                async with qemu.attach(running, identity) as machine:
                    checkpoint = await machine.checkpoint(into, hold=nobody)
                    assert checkpoint.kind.devices == WITH_HPET
                    assert await qemu.incompatibility(checkpoint.kind) is None
                    assert await ends_when_typed_to(host, running, machine)
                    await machine.quit()
                running = clone(running, f"c{number}", checkpoint.template)
