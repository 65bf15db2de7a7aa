"""Machines for tests. Their kernels are a few bytes, and no machine outlives its test."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import trio

from volant import images
from volant.host import Host
from volant.hypervisor import MachineSpec
from volant.hypervisor.qemu import QemuHypervisor, _probe

HANG = bytes([0xF4, 0xEB, 0xFD])
RESET = bytes([0xBA, 0xF9, 0x0C, 0, 0, 0xB0, 0x06, 0xEE]) + HANG  # 6 to port 0xCF9
POWEROFF = bytes([0x66, 0xBA, 0x04, 0x06, 0x66, 0xB8, 0x00, 0x20, 0x66, 0xEF]) + HANG  # S5 to PM1a control of q35


@contextmanager
def passable_directory() -> Iterator[Path]:
    """Makes a directory that other users can pass through and not list, for the length of a block."""
    path = Path(tempfile.mkdtemp(prefix="vt", dir="/tmp"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path)


def kernel(code: bytes) -> bytes:
    """Returns a PVH kernel that runs this code."""
    whole = bytearray(_probe.probe_kernel())
    at = len(whole) - len(_probe._CODE)
    whole[at : at + len(code)] = code
    return bytes(whole)


def machine_spec(host: Host, directory: Path, kernel: Path, initramfs: Path, /, **other: Any) -> MachineSpec:
    """Returns the spec of a small machine with its files in `directory` and its memory in RAM."""
    tag = f"volant-test-{host.random.new_id()}"
    spec = MachineSpec(
        vm_id=7,
        name="demo",
        cpu_cores=1,
        memory_mb=64,
        kernel=kernel,
        initramfs=initramfs,
        cmdline="",
        directory=directory,
        memory_file=Path("/dev/shm") / tag / "7.mem",
        tag=tag,
        accelerator="tcg",
    )
    return msgspec.structs.replace(spec, **other)


def guest_spec(host: Host, image_cache: Path, directory: Path, /, **other: Any) -> MachineSpec:
    """Returns the spec of a machine that boots the built image."""
    image = images.find(image_cache)
    assert image is not None
    cmdline = " ".join(image.kernel_parameters)
    return machine_spec(host, directory, image.kernel, image.initramfs, **{"cmdline": cmdline, **other})


def tiny_spec(host: Host, directory: Path, code: bytes = HANG, /, **other: Any) -> MachineSpec:
    """Returns a spec whose kernel runs this code."""
    (directory / "kernel").write_bytes(kernel(code))
    (directory / "initramfs").write_bytes(b"x" * 100)
    return machine_spec(host, directory / "vm", directory / "kernel", directory / "initramfs", **other)


@asynccontextmanager
async def real_qemu(
    host: Host, spec: MachineSpec, cache: Path, program: str = "qemu-system-x86_64"
) -> AsyncIterator[QemuHypervisor]:
    """Yields a hypervisor on TCG. At the end kills all processes whose tags begin with `spec`'s, and removes their
    memory."""
    try:
        yield QemuHypervisor(host, cache, accelerator="tcg", program=program)
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 30):
            await host.processes.end(await host.processes.scan(spec.tag))
            await host.files.remove_tree(spec.memory_file.parent)
