"""Finds out whether KVM can run guests on this host.

An existing `/dev/kvm` proves nothing: in a VM it may open, create a VM and fail at a guest's first instructions. So the
probe runs a guest: a PVH kernel of a few bytes, with the machine type and CPU model of real guests, that ends QEMU with
a special exit status. Any other result, a hang included, means TCG.

The kernel uses long mode with paging, and two instructions that every kernel uses and that KVM can run but not emulate
(`cmpxchg16b` and SSE arithmetic). KVM in a VM without hardware support (`kvm_pvm`) emulates kernel mode in software;
simpler code would pass there, but Linux would crash in its first second.

The result is cached for one version of the kernel and of QEMU. A timeout is not cached, as it may only mean that the
host is busy.
"""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

import msgspec
import trio

from volant.host import PROGRAM_ENVIRONMENT, Host
from volant.hypervisor._interface import AcceleratorChoice

from ._argv import machine_option

DEADLINE_S = 10.0
EXIT_PORT = 0xF4
EXIT_VALUE = 0x2A
_TOO_SLOW = f"a small guest did not finish within {DEADLINE_S:.0f} s"
EXIT_STATUS = EXIT_VALUE << 1 | 1
"""The exit status that isa-debug-exit derives from the value."""

_VERSION = re.compile(rb"QEMU emulator version (\d+)\.(\d+)(\.\d+)?")
_LOAD = 0x100000
_TABLES = 0x110000
_INTERNAL_ERROR = b"KVM internal error"

_CODE = bytes.fromhex(
    "c7050000110003101100"  # mov [tables], tables + 0x1003             the level 4 table
    "c7050010110003201100"  # mov [tables + 0x1000], tables + 0x2003    level 3
    "c7050020110083000000"  # mov [tables + 0x2000], 0x83               level 2: the first 2 MiB, one large page
    "b800001100 0f22d8"  # cr3 = tables
    "b820060000 0f22e0"  # cr4 = PAE, OSFXSR, OSXMMEXCPT
    "b9800000c0 0f32 0d00010000 0f30"  # EFER |= LME
    "0f20c0 83e0fb 0d03000080 0f22c0"  # cr0 = cr0 without EM, with PE, MP, PG
    "0f011580001000"  # lgdt
    "ea580010000800"  # far jump to the next line, now in 64 bits
    "be00301100 f0480fc70e"  # lock cmpxchg16b [tables + 0x3000]
    "660ffec0"  # paddd xmm0, xmm0
    "b02a e6f4"  # out EXIT_PORT, EXIT_VALUE
    "f4 ebfd"  # hlt, for ever
    "0f1f00"  # to a multiple of 8
    "0000000000000000 ffff0000009baf00"  # the descriptor table: null, 64-bit code
    "0f0070001000"  # its limit and address
)


class _Remembered(msgspec.Struct, frozen=True):
    kernel: str
    version: str
    choice: AcceleratorChoice


async def qemu_version(host: Host, program: str) -> tuple[int, int, str] | None:
    """Returns QEMU's major, minor and complete version; None if it is missing or does not run."""
    try:
        status, output = await host.processes.run(
            [program, "--version"], env=PROGRAM_ENVIRONMENT, cwd=Path("/"), timeout_s=DEADLINE_S
        )
    except (OSError, trio.TooSlowError):
        return None
    match = _VERSION.search(output)
    if status != 0 or match is None:
        return None
    return int(match[1]), int(match[2]), b".".join((match[1], match[2])).decode() + (match[3] or b"").decode()


async def probe(host: Host, cache_dir: Path, program: str, version: tuple[int, int, str]) -> AcceleratorChoice:
    """Returns how guests run under this kernel and this QEMU, from the cache or by running the small guest."""
    path = cache_dir / "accelerator.json"
    kernel = os.uname().release
    try:
        known = msgspec.json.decode(await host.files.read(path, 65536), type=_Remembered)
        # The device may have appeared or disappeared since.
        if (known.kernel, known.version) == (kernel, version[2]) and host.files.exists(Path("/dev/kvm")):
            return known.choice
    except (OSError, ValueError):
        pass
    if not host.files.exists(Path("/dev/kvm")):
        return AcceleratorChoice("tcg", "there is no /dev/kvm", version[2])
    why = await _try_kvm(host, cache_dir, program, version)
    if why is None:
        choice = AcceleratorChoice("kvm", "a guest ran on KVM", version[2])
    else:
        choice = AcceleratorChoice("tcg", f"KVM runs no guest here: {why}", version[2])
    if why == _TOO_SLOW:
        return choice
    try:
        await host.files.mkdir(cache_dir, 0o755)
        await host.files.write(path, msgspec.json.encode(_Remembered(kernel, version[2], choice)), 0o644)
    except OSError:
        pass  # the next start probes again
    return choice


async def _try_kvm(host: Host, cache_dir: Path, program: str, version: tuple[int, int, str]) -> str | None:
    """Runs the small guest. Returns None if it ran, otherwise the reason."""
    directory = cache_dir / f"probe-{host.random.new_id()}"
    try:
        await host.files.mkdir(directory)
        await host.files.write(directory / "guest.elf", probe_kernel())
        status, output = await host.processes.run(
            [
                program,
                *("-machine", machine_option("kvm", version[:2]), "-accel", "kvm", "-cpu", "host", "-m", "64M"),
                *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
                *("-device", f"isa-debug-exit,iobase={EXIT_PORT:#x},iosize=4", "-kernel", "guest.elf"),
            ],
            env=PROGRAM_ENVIRONMENT,
            cwd=directory,
            timeout_s=DEADLINE_S,
            # QEMU does not exit after this error.
            until=_INTERNAL_ERROR,
        )
    except trio.TooSlowError:
        return _TOO_SLOW
    except OSError as error:
        return f"the probe could not run: {error}"
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(5.0):
            await host.files.remove_tree(directory)
    if status == EXIT_STATUS:
        return None
    if _INTERNAL_ERROR in output:
        return "the virtual CPU stops with an internal error"
    lines = output.decode("utf-8", "replace").strip().splitlines()
    how = f"signal {-status}" if status < 0 else f"status {status}"
    return f"QEMU ended with {how}" + (f": {lines[0][:300]}" if lines else "")


def probe_kernel() -> bytes:
    """Returns an ELF file for PVH that writes `EXIT_VALUE` to the port that ends QEMU."""
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", _LOAD)  # XEN_ELFNOTE_PHYS32_ENTRY
    head, segment = 64, 56
    note_at = head + 2 * segment
    code_at = note_at + len(note)
    elf = struct.pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01",
        *(2, 62, 1, _LOAD, head, 0, 0, head, segment, 2, 0, 0, 0),
    )
    load = struct.pack("<IIQQQQQQ", 1, 7, code_at, _LOAD, _LOAD, len(_CODE), _TABLES + 0x4000 - _LOAD, 1)
    notes = struct.pack("<IIQQQQQQ", 4, 4, note_at, 0, 0, len(note), len(note), 4)
    return elf + load + notes + note + _CODE
