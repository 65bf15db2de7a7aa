"""Opens connections to the daemon for WebSockets."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import trio

from ._address import reason_of

if TYPE_CHECKING:
    from ._http import Http

_PROBES = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
# A command in a guest may be silent for hours, so the kernel checks whether the daemon's host is still there. Not every
# system lets a program say how often; there the kernel's own times count.
KEEPALIVE = [
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *((socket.IPPROTO_TCP, getattr(socket, name), value) for name, value in _PROBES.items() if hasattr(socket, name)),
]


async def connect(http: Http, timeout_s: float) -> trio.abc.Stream:
    """Opens a connection.

    :raises Unreachable: there is no connection within `timeout_s`, or it leads to a program of another user
        (`check_server`).
    """
    address = http.address
    try:
        with trio.fail_after(timeout_s):
            if address.socket_path is not None:
                return await trio.open_unix_socket(address.socket_path)
            stream = await trio.open_tcp_stream(address.host, address.port)
            for level, option, value in KEEPALIVE:
                stream.setsockopt(level, option, value)
            if not address.tls:
                try:
                    http.check_server(stream.socket)
                except BaseException:
                    await trio.aclose_forcefully(stream)
                    raise
                return stream
            secured = trio.SSLStream(stream, http.tls, server_hostname=address.host, https_compatible=True)
            await secured.do_handshake()
            return secured
    except trio.TooSlowError:
        raise address.unreachable(f"no connection within {timeout_s:g} s") from None
    except (OSError, trio.BrokenResourceError) as error:
        raise address.unreachable(reason_of(error)) from error
