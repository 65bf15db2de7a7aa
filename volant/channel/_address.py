"""The addresses of guests: the two ways to reach one."""

from __future__ import annotations

from pathlib import Path

import msgspec


class VirtioSerial(msgspec.Struct, frozen=True):
    """The Unix socket of a virtio-serial port. It carries one connection, so streams are multiplexed over it."""

    path: Path


class Vsock(msgspec.Struct, frozen=True):
    """A guest with a vhost-vsock device: a stream is a connection of its own."""

    cid: int


Address = VirtioSerial | Vsock
