"""The command line: a machine that can be adopted, reports how it ended, and can become a template."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from volant.hypervisor import AcceleratorName, Disk, MachineSpec, Nic, SharedDirectory, Template
from volant.hypervisor.qemu._argv import FORMAT, WITH_HPET, build_argv, format_of, tsc_khz_of
from volant.hypervisor.qemu._netdev import connects_itself
from volant.hypervisor.qemu._parse_argv import parse_argv

SPEC = MachineSpec(
    vm_id=7,
    name="demo",
    cpu_cores=2,
    memory_mb=256,
    kernel=Path("/cache/vmlinux"),
    initramfs=Path("/cache/initramfs"),
    cmdline="debug",
    directory=Path("/run/volant/vms/7"),
    memory_file=Path("/dev/shm/volant/7.mem"),
    tag="volant-ab12-7.1",
    accelerator="tcg",
)

SHARED = tuple(SharedDirectory(f"directory{number}", Path(f"/run/7.{number}.sock")) for number in range(2))
WITH = msgspec.structs.replace(SPEC, directories=SHARED)


def options(argv: list[str]) -> dict[str, list[str]]:
    """Returns the values by option."""
    found: dict[str, list[str]] = {}
    for at, item in enumerate(argv):
        if item.startswith("-"):
            following = argv[at + 1] if at + 1 < len(argv) else ""
            found.setdefault(item, []).append("" if following.startswith("-") else following)
    return found


def test_the_command_line_has_the_tag_and_no_default_devices() -> None:
    found = options(build_argv(SPEC, (10, 0)))
    assert found["-name"] == ["guest=volant-ab12-7.1,debug-threads=on"]
    assert {"-nodefaults", "-no-user-config"} <= found.keys()
    assert found["-display"] == ["none"]
    assert found["-sandbox"] == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny"]
    assert found["-action"] == ["shutdown=pause,reboot=shutdown,panic=pause"]


def test_memory_is_a_shared_file_so_that_a_machine_can_become_a_template() -> None:
    """Memory is a shared file, the machine type is versioned, everything has an id."""
    found = options(build_argv(SPEC, (9, 2)))
    assert found["-machine"][0].startswith("pc-q35-9.2,")
    assert "memory-backend=memory0" in found["-machine"][0]
    assert "memory-backend-file,id=memory0,size=256M,mem-path=/dev/shm/volant/7.mem,share=on" in found["-object"]
    for option in ("-device", "-object", "-chardev"):
        assert all("id=" in value for value in found[option]), option


def test_both_machines_have_the_same_devices_on_their_own_bus() -> None:
    tcg = options(build_argv(SPEC, (10, 0)))
    kvm = options(build_argv(msgspec.structs.replace(SPEC, accelerator="kvm"), (10, 0)))
    assert [d.split(",", 1)[1] for d in tcg["-device"]] == [d.split(",", 1)[1] for d in kvm["-device"]]
    assert any(d.startswith("virtio-serial-pci,") for d in tcg["-device"])
    assert any(d.startswith("virtio-serial-device,") for d in kvm["-device"])
    assert kvm["-machine"][0].startswith("microvm,")
    assert (kvm["-accel"], kvm["-cpu"]) == (["kvm"], ["host"])
    assert tcg["-accel"][0].startswith("tcg,tb-size=")


def test_a_machine_has_no_timer_that_never_rests() -> None:
    """QEMU's HPET wakes its process 250 times a second, for ever. microvm has none."""
    argv = build_argv(SPEC, (10, 0))
    assert "hpet=off" in options(argv)["-machine"][0].split(",")
    assert format_of(argv) == FORMAT
    old = build_argv(SPEC, (10, 0), devices=WITH_HPET)
    assert "hpet" not in options(old)["-machine"][0]
    assert format_of(old) == WITH_HPET
    kvm = build_argv(msgspec.structs.replace(SPEC, accelerator="kvm"), (10, 0))
    assert "hpet" not in options(kvm)["-machine"][0]
    assert format_of(kvm) == FORMAT


def test_a_guest_trusts_its_tsc_if_the_host_does_and_is_told_its_rate() -> None:
    """Under KVM, guests have a clock of its own; a machine with an HPET goes on as it began."""
    trusting = build_argv(SPEC, (10, 0), tsc_khz=2_596_130)
    assert "tsc=nowatchdog tsc_early_khz=2596130 volant.hostname=demo" in options(trusting)["-append"][0]
    kvm = build_argv(msgspec.structs.replace(SPEC, accelerator="kvm"), (10, 0), tsc_khz=2_596_130)
    old = build_argv(SPEC, (10, 0), tsc_khz=2_596_130, devices=WITH_HPET)
    without = build_argv(SPEC, (10, 0))
    assert [tsc_khz_of(argv) for argv in (trusting, kvm, old, without)] == [2_596_130, 0, 0, 0]


def test_a_command_line_of_an_earlier_version_can_be_parsed_back() -> None:
    argv = build_argv(SPEC, (10, 0), tsc_khz=2_596_130)
    at = argv.index("-append") + 1
    newer = {"psi=0", "no_timer_check", "noreplace-smp", "tsc=nowatchdog", "tsc_early_khz=2596130"}
    assert newer < set(argv[at].split())
    for cmdline in (argv[at], " ".join(word for word in argv[at].split() if word not in newer)):
        found = parse_argv([*argv[:at], cmdline, *argv[at + 1 :]])
        assert found is not None
        assert (found.name, found.cmdline) == ("demo", "debug")


def test_commas_in_paths_do_not_become_options() -> None:
    spec = msgspec.structs.replace(SPEC, memory_file=Path("/dev/shm/a,share=off"))
    assert any("mem-path=/dev/shm/a,,share=off,share=on" in v for v in options(build_argv(spec, (10, 0)))["-object"])


def test_socket_paths_are_short_for_any_state_directory() -> None:
    deep = msgspec.structs.replace(SPEC, directory=Path("/" + "d" * 300))
    assert not any("d" * 300 in item for item in build_argv(deep, (10, 0)))


def test_the_vm_s_own_kernel_options_come_last() -> None:
    line = options(build_argv(SPEC, (10, 0)))["-append"][0]
    assert line.startswith("console=ttyS0 ")
    assert "volant.hostname=demo" in line
    assert line.endswith(" debug")


def test_a_guest_gets_vsock_where_the_spec_says_so() -> None:
    argv = build_argv(msgspec.structs.replace(SPEC, vsock_cid=10), (10, 0))
    assert "vhost-vsock-pci,id=vsock0,guest-cid=10" in argv


def test_a_disk_is_a_layer_over_a_read_only_base() -> None:
    disk = Disk(Path("/cache/artifacts/a,b"), Path("/state/disks/7/root.qcow2"))
    for accelerator, device in (("tcg", "virtio-blk-pci"), ("kvm", "virtio-blk-device")):
        spec = msgspec.structs.replace(SPEC, root=disk, accelerator=accelerator)
        found = options(build_argv(spec, (10, 0)))
        nodes = {node.split("node-name=")[1].split(",")[0]: node for node in found["-blockdev"]}
        assert list(nodes) == ["root-base-file", "root-base", "root-layer-file", "root"]
        assert all("read-only=on" in nodes[name] for name in ("root-base-file", "root-base"))
        assert "filename=/cache/artifacts/a,,b," in nodes["root-base-file"]
        assert "backing=root-base," in nodes["root"]
        assert any(value.startswith(f"{device},id=root0,drive=root,serial=volant-root") for value in found["-device"])
        assert "volant.root=volant-root debug" in found["-append"][0]
    assert "-blockdev" not in build_argv(SPEC, (10, 0))


def test_a_disk_without_a_base_lies_above_the_read_only_disk_of_an_oci_image() -> None:
    disk = Disk(None, Path("/state/disks/7/root.qcow2"), 1024, Path("/cache/oci/images/a,b/disk.vmdk"))
    argv = build_argv(msgspec.structs.replace(SPEC, root=disk), (10, 0))
    found = options(argv)
    layer_file, layer, image_file, image = found["-blockdev"]
    assert "filename=/state/disks/7/root.qcow2," in layer_file
    # What the layer itself says about a base does not count.
    assert json.loads(layer)["backing"] is None
    assert "filename=/cache/oci/images/a,,b/disk.vmdk,read-only=on" in image_file
    assert image == "vmdk,node-name=image,file=image-file,read-only=on"
    assert any("drive=image,serial=volant-image," in value for value in found["-device"])
    assert "volant.root=volant-root volant.image=volant-image debug" in found["-append"][0]
    machine = parse_argv(argv)
    assert machine is not None
    # The size is that of the layer.
    assert (machine.root, machine.cmdline) == (msgspec.structs.replace(disk, size_mb=None), "debug")


def test_a_clone_maps_its_templates_memory_read_only() -> None:
    """A clone can't discard pages of the file, and its name is only for readers of the command line."""
    clone = msgspec.structs.replace(SPEC, template=Template(Path("/t/digest/memory"), Path("/t/digest/state")))
    argv = build_argv(clone, (10, 0))
    found = options(argv)
    memory = "memory-backend-file,id=memory0,size=256M,mem-path=/t/digest/memory,share=off,readonly=on,rom=off"
    assert memory in found["-object"]
    assert found["-incoming"] == ["defer"]
    assert "-incoming" not in build_argv(SPEC, (10, 0))
    machine = parse_argv(argv)
    assert machine is not None
    assert (machine.name, machine.memory_file, machine.template) == ("demo", None, Path("/t/digest"))


def test_a_machine_with_its_own_memory_can_have_a_balloon_which_its_copy_keeps() -> None:
    """No other device changes its place on the bus."""
    plain, balloon = build_argv(SPEC, (10, 0)), build_argv(msgspec.structs.replace(SPEC, balloon=True), (10, 0))
    assert balloon == [*plain, "-device", "virtio-balloon-pci,id=balloon0,free-page-reporting=on"]
    template = Template(Path("/forks/1/memory"), Path("/forks/1/state"))
    copy = build_argv(msgspec.structs.replace(SPEC, balloon=True, template=template), (10, 0))
    assert any("share=off,readonly=on,rom=off" in value for value in options(copy)["-object"])
    assert options(copy)["-device"] == options(balloon)["-device"]


DISK = Disk(Path("/cache/artifacts/ab,12"), Path("/state/disks/7-now/root.qcow2"))
NIC = Nic(
    mac="02:00:00:00:00:07",
    tap="v12345678000007",
    address="192.168.127.7/24",
    gateway="192.168.127.1",
    nameservers=("192.168.127.1", "9.9.9.9"),
)


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
@pytest.mark.parametrize("balloon", [False, True])
def test_a_nic_changes_no_other_device(accelerator: AcceleratorName, balloon: bool) -> None:
    """So that states without one can still be loaded."""
    without = msgspec.structs.replace(SPEC, accelerator=accelerator, balloon=balloon, root=DISK)
    argv = build_argv(msgspec.structs.replace(without, nic=NIC), (10, 0))
    plain = build_argv(without, (10, 0))
    assert [word for word in plain if word not in argv] == options(plain)["-append"]
    devices = options(argv)["-device"]
    assert devices[:-1] == options(plain)["-device"]
    assert devices[-1].startswith(
        f"virtio-net-{'pci' if accelerator == 'tcg' else 'device'},id=nic0,netdev=v12345678000007,mac="
    )
    assert ("romfile=" in devices[-1].split(",")) == (accelerator == "tcg")


@pytest.mark.parametrize("accelerator", ["tcg", "kvm"])
def test_a_copy_announces_no_address_and_can_power_off(accelerator: AcceleratorName) -> None:
    """With the announce feature, QEMU 10.0 crashes when a copy's NIC is reset."""
    template = Template(Path("/forks/1/memory"), Path("/forks/1/state"))
    for spec in (SPEC, msgspec.structs.replace(SPEC, template=template)):
        argv = build_argv(msgspec.structs.replace(spec, nic=NIC, accelerator=accelerator), (10, 0))
        assert "guest_announce=off" in options(argv)["-device"][-1].split(",")


def test_a_tap_is_inherited_and_its_name_is_on_the_command_line() -> None:
    argv = build_argv(msgspec.structs.replace(SPEC, nic=NIC), (10, 0), tap=12)
    assert options(argv)["-netdev"] == ["tap,id=v12345678000007,fd=12,vhost=off"]


def test_a_nic_with_a_socket_has_a_hub_that_is_connected_later() -> None:
    argv = build_argv(msgspec.structs.replace(SPEC, nic=Nic(mac=NIC.mac, socket=Path("/run/7.sock"))), (10, 0))
    assert options(argv)["-netdev"] == ["hubport,id=net0,hubid=0"]
    assert "7.sock" not in " ".join(argv)
    assert not connects_itself(argv)


def test_a_machine_of_an_earlier_daemon_connects_by_itself() -> None:
    argv = build_argv(msgspec.structs.replace(SPEC, nic=Nic(mac=NIC.mac)), (10, 0))
    before = "stream,id=net0,server=off,addr.type=unix,addr.path=/run/a,,b/7.sock,reconnect-ms=1000"
    argv[argv.index("-netdev") + 1] = before
    assert connects_itself(argv)
    found = parse_argv(argv)
    assert found is not None
    assert found.nic == Nic(mac=NIC.mac, socket=Path("/run/a,b/7.sock"))


def test_network_parameters_come_before_the_vms_kernel_options() -> None:
    line = options(build_argv(msgspec.structs.replace(SPEC, nic=NIC), (10, 0)))["-append"][0]
    told = "volant.net=192.168.127.7/24,192.168.127.1,02:00:00:00:00:07 volant.dns=192.168.127.1,9.9.9.9"
    assert line.endswith(f" {told} debug")
    silent = msgspec.structs.replace(SPEC, nic=Nic(mac=NIC.mac))
    argv = build_argv(silent, (10, 0))
    assert options(argv)["-append"] == options(build_argv(SPEC, (10, 0)))["-append"]
    assert options(argv)["-netdev"] == ["hubport,id=net0,hubid=0"], "it leads nowhere"


def test_a_template_has_no_name_and_a_lower_priority() -> None:
    argv = build_argv(msgspec.structs.replace(SPEC, name="", in_background=True), (10, 0))
    assert argv[:4] == ["nice", "-n", "10", "qemu-system-x86_64"]
    assert "volant.hostname" not in options(argv)["-append"][0]


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        msgspec.structs.replace(SPEC, accelerator="kvm", cmdline="", memory_file=Path("/dev/shm/a,b/7.mem")),
        msgspec.structs.replace(SPEC, root=DISK, cmdline="quiet loglevel=3 volant.other=1"),
        msgspec.structs.replace(SPEC, balloon=True),
        msgspec.structs.replace(SPEC, balloon=True, accelerator="kvm"),
        msgspec.structs.replace(SPEC, nic=NIC),
        msgspec.structs.replace(SPEC, nic=Nic(mac=NIC.mac, tap="tap1"), accelerator="kvm"),
        msgspec.structs.replace(SPEC, nic=Nic(mac=NIC.mac)),
    ],
)
def test_a_command_line_can_be_parsed_back(spec: MachineSpec) -> None:
    found = parse_argv(build_argv(spec, (10, 0)))
    assert found is not None
    assert found.directory_count == len(spec.directories)
    for field in {*found.__struct_fields__} - {"directory_count"}:
        assert getattr(found, field) == getattr(spec, field), field


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["sleep", "7"],
        ["qemu-system-x86_64", "-name", "guest=volant-ab12-7.1"],
        [*build_argv(SPEC, (10, 0))[:-1], "console=ttyS0"],
        [word.replace("256M", "a lot") for word in build_argv(SPEC, (10, 0))],
    ],
)
def test_a_foreign_command_line_gives_no_machine(argv: list[str]) -> None:
    assert parse_argv(argv) is None


@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
def test_directories_come_last_and_change_no_other_device(accelerator: AcceleratorName) -> None:
    spec = msgspec.structs.replace(WITH, accelerator=accelerator)
    without = build_argv(msgspec.structs.replace(spec, directories=()), (10, 0))
    argv = build_argv(spec, (10, 0), connections=(8, 9))
    assert argv[: len(without)] == without
    kind = "device" if accelerator == "kvm" else "pci"
    assert options(argv)["-chardev"][-2:] == ["socket,id=directory0,fd=8", "socket,id=directory1,fd=9"]
    assert options(argv)["-device"][-1] == f"vhost-user-fs-{kind},id=fs-directory1,chardev=directory1,tag=directory1"


def test_the_memory_of_such_a_machine_is_shared() -> None:
    (memory,) = [text for text in options(build_argv(WITH, (10, 0), connections=(8, 9)))["-object"] if "mem" in text]
    assert memory.endswith("share=on")


def test_an_orphan_is_known_to_have_them() -> None:
    parsed = parse_argv(build_argv(WITH, (10, 0), connections=(8, 9)))
    assert parsed is not None
    assert parsed.directory_count == 2
