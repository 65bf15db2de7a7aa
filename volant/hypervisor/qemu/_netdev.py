"""Connects a machine's network interface to its tap, or to a process that listens at a Unix socket (passt).

The interface of such a machine is connected to a hub from the start. The daemon opens the tap or connects to the
socket, passes the descriptor to QEMU over QMP and plugs it into the hub. So QEMU's process needs no right for either,
and its seccomp filter denies `connect`.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise

import trio

from volant.host import Host
from volant.hypervisor._interface import Nic

from ._qmp import QmpClient, QmpRefused

_CONNECT_S = 5.0
_TAP_S, _TAP_RETRY_S = 2.0, 0.02
"""How long to wait for a tap that is in use: the daemon itself opens it for some milliseconds for its setup."""
_HUB_PORT, _BEHIND_HUB, _HANDED = "net1", "net2", "handed"
"""The hub's second port, the backend behind it, and QEMU's temporary name for the descriptor."""
_IDLE_PORT = "net3"
"""The hub's third port, without a backend, which drops every packet. Without it the hub accepts no packet while its
second port is being replaced: a packet that the guest sends in that moment stays queued, and QEMU 10.0 never wakes the
interface again."""


async def plug_in(host: Host, qmp: QmpClient, nic: Nic | None) -> None:
    """Opens the backend of `nic` and plugs it into the machine's hub, in place of an earlier one.

    Does nothing for a machine without a network interface, or with an unconnected one. Raises OSError and
    trio.TooSlowError if the tap or the socket can't be opened, QmpRefused and QmpLost if QEMU does not accept it.
    """
    with ExitStack() as stack:
        if nic is None:
            return
        if nic.tap is not None:
            descriptor = await open_tap(host, nic.tap, stack)
            behind: dict[str, object] = {"type": "tap", "fd": _HANDED, "vhost": False}
        elif nic.socket is not None:
            descriptor = stack.enter_context(await host.sockets.open_unix(nic.socket, _CONNECT_S))
            # QEMU's `stream` looks for the descriptor in a thread that has no monitor.
            behind = {"type": "socket", "fd": _HANDED}
        else:
            return
        with suppress(QmpRefused):
            # It exists already if this replaces an earlier connection.
            await qmp.execute("netdev_add", {"id": _IDLE_PORT, "type": "hubport", "hubid": 0})
        for name in (_HUB_PORT, _BEHIND_HUB):
            # Neither exists at first, and only one if an earlier call was cancelled.
            with suppress(QmpRefused):
                await qmp.execute("netdev_del", {"id": name})
        await qmp.execute("getfd", {"fdname": _HANDED}, descriptor=descriptor)
    await qmp.execute("netdev_add", {"id": _BEHIND_HUB, **behind})
    await qmp.execute("netdev_add", {"id": _HUB_PORT, "type": "hubport", "hubid": 0, "netdev": _BEHIND_HUB})


async def open_tap(host: Host, name: str, stack: ExitStack) -> int:
    """Returns a descriptor of a tap, open until `stack` closes. :raises OSError: it can't be opened, or is in use."""
    deadline = trio.current_time() + _TAP_S
    while True:
        try:
            return stack.enter_context(host.sockets.open_tap(name))
        except OSError as error:
            if error.errno != errno.EBUSY or trio.current_time() >= deadline:
                raise
        await trio.sleep(_TAP_RETRY_S)


def connects_itself(argv: Sequence[str]) -> bool:
    """Returns whether a QEMU with this command line connects to its socket by itself, because a daemon started it that
    did not pass descriptors yet."""
    return any(option == "-netdev" and value.startswith("stream,") for option, value in pairwise(argv))
