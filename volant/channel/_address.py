"""The addresses of guests: the three ways to reach one."""

from __future__ import annotations

from pathlib import Path

import msgspec


class VirtioSerial(msgspec.Struct, frozen=True):
    """The Unix socket of a virtio-serial port. It carries one connection, so streams are multiplexed over it."""

    path: Path


class Vsock(msgspec.Struct, frozen=True):
    """A guest with a vhost-vsock device: a stream is a connection of its own."""

    cid: int


class HybridVsock(msgspec.Struct, frozen=True):
    """The Unix socket of a hypervisor that maps connections to vsock ports by a line `CONNECT <port>`."""

    path: Path


Address = VirtioSerial | Vsock | HybridVsock
