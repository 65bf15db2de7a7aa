"""Saves the devices of a paused machine.

Xen's command `xen-save-devices-state` takes two milliseconds, writes 120 kB and leaves the machine as if it had only
been paused. It does not save the memory of firmware, which a guest no longer needs once its kernel runs. So a
migration saves the templates that it can. It can't save a clone, as `x-ignore-shared` only skips shared memory, and the
rest would be written to the stream; nor a machine with the disk of an OCI image, as QEMU migrates none with a disk of
that format, although nothing of a disk that is only read has to be handed over.

The command omits the sections with the machine type, the capabilities and the description of the stream.
`migrate-incoming` needs them, so this module adds them (for QEMU 10.0).
"""

from __future__ import annotations

import errno
import struct
from pathlib import Path

from ._migration import CAPABILITY
from ._qmp import QmpClient

SAVE_S = 30.0
_HEAD = b"QEVM" + struct.pack(">I", 3)
_CONFIGURATION = 0x07
_SUBSECTION = 0x05
_DESCRIPTION = bytes([0x06]) + struct.pack(">I", 0)


async def save_devices(qmp: QmpClient, state: Path, timeout_s: float = SAVE_S) -> None:
    """Saves the devices to a file that QEMU can write. Raises QmpRefused, QmpLost."""
    arguments = {"filename": str(state), "live": False}
    await qmp.execute("xen-save-devices-state", arguments, timeout_s=timeout_s)


async def machine_type(qmp: QmpClient) -> str:
    """Returns the machine's versioned type. Raises QmpRefused, QmpLost."""
    found = await qmp.execute("qom-get", {"path": "/machine", "property": "type"})
    return str(found).removesuffix("-machine")


def complete(state: bytes, machine: str) -> bytes:
    """Adds the missing sections to a stream of devices. Raises OSError when it is not such a stream."""
    head, rest = state[: len(_HEAD)], state[len(_HEAD) :]
    if head != _HEAD:
        raise OSError(errno.EINVAL, "QEMU saved the devices in an unknown format")
    name, section = machine.encode(), b"configuration/capabilities"
    configuration = (
        *(bytes([_CONFIGURATION]), struct.pack(">I", len(name)), name),
        *(bytes([_SUBSECTION, len(section)]), section, struct.pack(">I", 1)),
        *(struct.pack(">I", 1), bytes([len(CAPABILITY)]), CAPABILITY.encode()),
    )
    return head + b"".join(configuration) + rest + _DESCRIPTION
