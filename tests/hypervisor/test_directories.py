"""Host directories on the command line: the last devices, over inherited connections."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.hypervisor.test_argv import SPEC, options
from volant.hypervisor import AcceleratorName, SharedDirectory
from volant.hypervisor.qemu._argv import build_argv
from volant.hypervisor.qemu._parse_argv import parse_argv

SHARED = tuple(SharedDirectory(f"directory{number}", Path(f"/run/7.{number}.sock")) for number in range(2))
WITH = msgspec.structs.replace(SPEC, directories=SHARED)


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
