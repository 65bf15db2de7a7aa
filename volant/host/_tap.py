"""Opens taps, with the flags that QEMU uses; see `Documentation/networking/tuntap.rst` of the kernel."""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

TUN = Path("/dev/net/tun")
_TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER = 0x400454CA, 0x400454CB, 0x400454CC
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000


def open_tap(name: str) -> int:
    """Returns a descriptor of a tap that nobody else has open. Creates the tap if it does not exist.

    A tap that this created is removed with its last descriptor, unless `make_permanent` was called.

    :raises OSError: `EBUSY` when another process has it open, `EINVAL` when the interface is not a tap.
    """
    tun = os.open(TUN, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    except OSError:
        os.close(tun)
        raise
    return tun


def make_permanent(tun: int, user: int) -> None:
    """Lets a tap outlive its descriptors. Only `user` and root may open it. Raises OSError."""
    fcntl.ioctl(tun, _TUNSETOWNER, user)
    fcntl.ioctl(tun, _TUNSETPERSIST, 1)
