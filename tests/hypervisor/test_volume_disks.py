"""Volumes on the command line: the last devices, found again for adoption, and in one throttle group."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.hypervisor.test_argv import SPEC, options
from volant.host import Host
from volant.hypervisor import AcceleratorName, Disk, DiskLimits, Nic, VolumeDisk
from volant.hypervisor.qemu._argv import build_argv
from volant.hypervisor.qemu._parse_argv import parse_argv
from volant.hypervisor.qemu._sandbox import QemuSandbox, SandboxPlan
from volant.hypervisor.qemu._volume_disks import disk_error, resize_arguments, throttle_arguments

WRITER = VolumeDisk(Path("/state/volumes/a,b.img"), "vol-0123456789abcdef")
READER = VolumeDisk(Path("/state/volumes/c.img"), "vol-fedcba9876543210", read_only=True)
ROOT = Disk(Path("/cache/base"), Path("/state/disks/7-x/root.qcow2"))
WITH = msgspec.structs.replace(SPEC, volumes=(WRITER, READER), root=ROOT, nic=Nic(mac="02:00:00:00:00:01", tap="t0"))


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_volumes_come_last_and_change_no_other_device(accelerator: AcceleratorName) -> None:
    spec = msgspec.structs.replace(WITH, accelerator=accelerator)
    without = build_argv(msgspec.structs.replace(spec, volumes=()), (10, 0), tap=9)
    argv = build_argv(spec, (10, 0), tap=9)
    assert argv[: len(without)] == without
    devices = options(argv)["-device"][-2:]
    assert [device.split(",")[0] for device in devices] == [
        f"virtio-blk-{'device' if accelerator == 'kvm' else 'pci'}"
    ] * 2
    for device in devices:
        assert device.endswith("werror=report,rerror=report"), "a full disk of the host would pause the guest"


def test_a_reader_can_not_write_and_a_comma_is_no_option() -> None:
    drives = options(build_argv(WITH, (10, 0), tap=9))["-blockdev"][-4:]
    assert drives[0] == "file,node-name=volume0-file,filename=/state/volumes/a,,b.img,discard=unmap"
    assert all("read-only=on" in drive for drive in drives[2:])


def test_an_orphan_has_the_volumes_of_its_command_line() -> None:
    parsed = parse_argv(build_argv(WITH, (10, 0), tap=9))
    assert parsed is not None
    assert (parsed.volumes, parsed.root) == ((WRITER, READER), msgspec.structs.replace(ROOT, size_mb=None))
    bare = parse_argv(build_argv(msgspec.structs.replace(WITH, root=None, volumes=(READER,)), (10, 0), tap=9))
    assert bare is not None
    assert (bare.volumes, bare.root) == ((READER,), None)


def test_all_disks_share_one_limit() -> None:
    limits = DiskLimits(iops=500, bytes_per_s=2**20)
    found = throttle_arguments(msgspec.structs.replace(WITH, accelerator="kvm"), limits)
    assert [each["id"] for each in found] == ["root0", "disk-volume0", "disk-volume1"]
    assert {(each["group"], each["iops"], each["bps"]) for each in found} == {("vm", 500, 2**20)}
    [first, *_] = throttle_arguments(WITH, DiskLimits(iops=10))
    assert (first["id"], first["bps"]) == ("/machine/peripheral/root0/virtio-backend", 0)


def test_a_volume_is_found_by_its_serial_number() -> None:
    assert resize_arguments(WITH, READER.serial, 2**30) == {"node-name": "volume1", "size": 2**30}
    with pytest.raises(LookupError):
        resize_arguments(WITH, "vol-0", 2**30)


def test_an_error_of_the_host_names_the_disk() -> None:
    event = {"node-name": "volume1-file", "operation": "write", "reason": "No space left on device"}
    assert disk_error(WITH, event) == "the host can't write to its volume c.img: No space left on device"
    assert disk_error(WITH, {"node-name": "root", "operation": "read"}).startswith("the host can't read its disk: ")


async def test_a_process_gets_its_own_volumes_and_only_reads_what_its_guest_reads(tmp_path: Path) -> None:
    for name in ("w.img", "r.img"):
        (tmp_path / name).write_bytes(b"")
    disks = (VolumeDisk(tmp_path / "w.img", "vol-w"), VolumeDisk(tmp_path / "r.img", "vol-r", read_only=True))
    spec = msgspec.structs.replace(SPEC, directory=tmp_path, volumes=disks)
    plan = SandboxPlan(places=(tmp_path,), landlock=3, no_connect=True, users=None)
    sandbox = await QemuSandbox(Host(), plan).prepare(spec)
    assert tmp_path / "w.img" in sandbox.write
    assert tmp_path / "r.img" in sandbox.read
    assert tmp_path / "r.img" not in sandbox.write
