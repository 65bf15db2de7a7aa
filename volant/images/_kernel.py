"""From Debian's kernel package to what a hypervisor boots.

`vmlinuz` unpacks itself, under emulation for a second and a half. Its payload is the ELF file with the PVH entry point
that QEMU can start at once, so it is unpacked here, once. The layout is that of the x86 boot protocol,
Documentation/arch/x86/boot.rst in the kernel's source.
"""

from __future__ import annotations

import lzma
import re
import struct

import zstandard

from ._errors import ImageError

_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_MAX_VMLINUX = 256 * 1024 * 1024
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")


def unpack_vmlinuz(vmlinuz: bytes) -> bytes:
    """Return the uncompressed kernel inside `vmlinuz`.

    :raises ImageError: it is no bzImage, not compressed with zstd, or what is inside is no ELF file
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
        # The payload ends with its length, which a one-shot decoder would take for a second frame.
        kernel = zstandard.ZstdDecompressor().decompressobj().decompress(payload)
    except zstandard.ZstdError as error:
        raise ImageError("bad_kernel", f"The kernel can't be unpacked: {error}") from None
    if kernel[:4] != b"\x7fELF" or len(kernel) > _MAX_VMLINUX:
        raise ImageError("bad_kernel", "What vmlinuz unpacks to is no kernel")
    return kernel


def module_dependencies(module: bytes) -> tuple[str, ...]:
    """Return the names that a kernel module says it depends on."""
    found = _DEPENDS.search(module)
    return tuple(name.decode() for name in found[1].split(b",") if name) if found else ()


def select_modules(packed: dict[str, bytes], wanted: tuple[str, ...]) -> dict[str, tuple[bytes, tuple[str, ...]]]:
    """Return `wanted` modules and all they need, unpacked, each with its direct dependencies.

    `packed` are the package's `.ko.xz` files by module name. Names are those that the kernel uses, with `_` for `-`.

    :raises ImageError: the package lacks one of them
    """
    chosen: dict[str, tuple[bytes, tuple[str, ...]]] = {}
    queue = [name.replace("-", "_") for name in wanted]
    while queue:
        name = queue.pop()
        if name in chosen:
            continue
        if name not in packed:
            raise ImageError("bad_kernel", f"The kernel package has no module {name}")
        data = lzma.decompress(packed[name])
        needs = tuple(need.replace("-", "_") for need in module_dependencies(data))
        chosen[name] = (data, needs)
        queue.extend(needs)
    return dict(sorted(chosen.items()))
