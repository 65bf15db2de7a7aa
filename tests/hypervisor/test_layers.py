"""A disk is a layer over a read-only image, and is created completely or not at all."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest
import trio

from volant.host import Host
from volant.hypervisor import Disk, LaunchFailed, MachineSpec
from volant.hypervisor.qemu import QemuHypervisor

pytestmark = [pytest.mark.programs, pytest.mark.skipif(shutil.which("qemu-img") is None, reason="there is no qemu-img")]

SIZE = 4 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    base = tmp_path / "base,with comma"
    base.write_bytes(b"x" * SIZE)
    base.chmod(0o444)
    (tmp_path / "vm").mkdir()
    return Disk(base, tmp_path / "vm" / "root.qcow2")


async def test_a_layer_shows_its_base_and_receives_writes(qemu: QemuHypervisor, disk: Disk) -> None:
    await qemu.make_layer(disk)
    info = json.loads(_run("qemu-img", "info", "--output=json", str(disk.layer)))
    assert (info["format"], info["virtual-size"]) == ("qcow2", SIZE)
    assert disk.layer.stat().st_size < 512 * 1024
    assert disk.base is not None
    before = hashlib.sha256(disk.base.read_bytes()).digest()
    _run("qemu-io", "-c", "read -P 0x78 0 4M", "-c", "write -P 0x79 0 64k", str(disk.layer))
    assert hashlib.sha256(disk.base.read_bytes()).digest() == before


async def test_a_layer_without_a_base_is_an_empty_file_system(qemu: QemuHypervisor, tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    disk = Disk(None, tmp_path / "vm" / "root.qcow2", 10 * 1024, tmp_path / "disk.vmdk")
    await qemu.make_layer(disk)
    info = json.loads(_run("qemu-img", "info", "--output=json", str(disk.layer)))
    assert (info["format"], info["virtual-size"]) == ("qcow2", 10 * 2**30)
    assert "backing-filename" not in info
    assert disk.layer.stat().st_blocks * 512 < 16 * 2**20
    _run("qemu-img", "convert", "-O", "raw", str(disk.layer), str(tmp_path / "raw"))
    _run("e2fsck", "-f", "-n", str(tmp_path / "raw"))
    assert [path.name for path in disk.layer.parent.iterdir()] == ["root.qcow2"]


@pytest.mark.parametrize("what", ["foreign", "external"])
async def test_a_layer_that_was_tampered_with_is_refused(
    qemu: QemuHypervisor, spec: MachineSpec, disk: Disk, tmp_path: Path, what: str
) -> None:
    await qemu.make_layer(disk)
    if what == "foreign":
        disk.layer.write_bytes(b"x" * 4096)
    else:
        options = f"data_file={tmp_path}/elsewhere,data_file_raw=on"
        _run("qemu-img", "create", "-f", "qcow2", "-o", options, str(disk.layer), "4M")
    with pytest.raises(LaunchFailed, match=r"root\.qcow2 (is|was)") as failure:
        await qemu.launch(msgspec.structs.replace(spec, root=disk))
    assert failure.value.code == "bad_disk"


async def test_an_incomplete_layer_is_replaced(qemu: QemuHypervisor, disk: Disk) -> None:
    half = disk.layer.with_name("root.qcow2.new")
    half.write_bytes(b"half")
    await qemu.make_layer(disk)
    assert [path.name for path in disk.layer.parent.iterdir()] == ["root.qcow2"]


async def test_a_layer_needs_its_base(qemu: QemuHypervisor, disk: Disk) -> None:
    assert disk.base is not None
    disk.base.unlink()
    with pytest.raises(LaunchFailed, match="can't be created") as failure:
        await qemu.make_layer(disk)
    assert failure.value.code == "bad_disk"
    assert not disk.layer.exists()


async def test_without_qemu_img_the_error_says_so(
    qemu: QemuHypervisor, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volant.hypervisor.qemu._layers._IMG", "no-such-qemu-img")
    with pytest.raises(LaunchFailed, match="qemu-utils") as failure:
        await qemu.make_layer(disk)
    assert failure.value.code == "qemu_missing"


async def test_a_cancelled_creation_leaves_no_layer(
    qemu: QemuHypervisor, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "slow"
    slow.write_text('#!/bin/sh\nfor last; do :; done; echo half >"$last"; exec sleep 60\n')
    slow.chmod(0o755)
    monkeypatch.setattr("volant.hypervisor.qemu._layers._IMG", str(slow))
    half = disk.layer.with_name("root.qcow2.new")
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(qemu.make_layer, disk)
            with Host().watches.open(half.parent) as watch:
                while not half.exists():
                    await watch.wait()
            nursery.cancel_scope.cancel()
    assert not disk.layer.exists()


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


async def test_a_layer_has_the_requested_size_and_takes_no_more(qemu: QemuHypervisor, disk: Disk) -> None:
    large = msgspec.structs.replace(disk, size_mb=8)
    await qemu.make_layer(large)
    info = json.loads(_run("qemu-img", "info", "--output=json", str(disk.layer)))
    assert info["virtual-size"] == 8 * 2**20
    _run("qemu-io", "-c", "write -P 0x79 0 8M", str(disk.layer))
    assert disk.layer.stat().st_size < 9 * 2**20
    with pytest.raises(subprocess.CalledProcessError):
        _run("qemu-io", "-c", "write 8M 64k", str(disk.layer))
