"""Unpacks the kernel and its modules from Debian's package.

`vmlinuz` unpacks itself at boot, which takes 1.5 s under emulation. Its payload is an ELF file with the PVH entry point
that QEMU starts at once, so it is unpacked here, once. Layout: the x86 boot protocol, in the kernel's
source Documentation/arch/x86/boot.rst.
"""

from __future__ import annotations

import lzma
import re
import struct
from pathlib import Path

import zstandard

from ._errors import ImageError

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_MAX_VMLINUX = 256 * 1024 * 1024
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def unpack_vmlinuz(vmlinuz: bytes) -> bytes:
    """Returns the uncompressed kernel inside `vmlinuz`.

    :raises ImageError: the file is not a bzImage with an ELF file compressed by zstd
    """
    if vmlinuz[0x202:0x206] != b"HdrS":
        raise ImageError("bad_kernel", "The kernel package's vmlinuz has no boot header")
    setup_sectors = vmlinuz[0x1F1] or 4
    offset, length = struct.unpack_from("<II", vmlinuz, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    payload = vmlinuz[start : start + length]
    if payload[:4] != _ZSTD_MAGIC:
        raise ImageError("bad_kernel", "The kernel package's vmlinuz is not compressed with zstd")
    try:
        # Streaming, as the payload ends with its length, which is not a zstd frame.
        kernel = zstandard.ZstdDecompressor().decompressobj().decompress(payload)
    except zstandard.ZstdError as error:
        raise ImageError("bad_kernel", f"The kernel can't be unpacked: {error}") from None
    if kernel[:4] != b"\x7fELF" or len(kernel) > _MAX_VMLINUX:
        raise ImageError("bad_kernel", "vmlinuz does not unpack to a kernel")
    return kernel


def module_dependencies(module: bytes) -> tuple[str, ...]:
    """Returns the names of the modules that a kernel module needs."""
    found = _DEPENDS.search(module)
    return tuple(name.decode() for name in found[1].split(b",") if name) if found else ()


def select_modules(packed: dict[str, Path], wanted: tuple[str, ...]) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Returns modules and their dependencies, unpacked, each with its direct dependencies.

    Names are those of the kernel, with `_` for `-`.

    :param packed: the package's `.ko.xz` files by module name
    :raises ImageError: the package lacks a module
    """
    chosen: dict[str, tuple[bytes, tuple[str, ...]]] = {}
    queue = [name.replace("-", "_") for name in wanted]
    while queue:
        name = queue.pop()
        if name in chosen:
            continue
        if name not in packed:
            raise ImageError("bad_kernel", f"The kernel package has no module {name}")
        data = lzma.decompress(packed[name].read_bytes())
        needs = tuple(need.replace("-", "_") for need in module_dependencies(data))
        chosen[name] = (data, needs)
        queue.extend(needs)
    return dict(sorted(chosen.items()))
