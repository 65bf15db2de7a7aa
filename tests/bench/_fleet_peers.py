"""Fakes the hosts of a large fleet, for the benchmark of its lists.

`python -m tests.bench._fleet_peers CERTIFICATE AUTHORITY HOSTS VMS` serves all of them in one process: each has a port
of its own, with the TLS of hosts, and answers the list of its VMs. It prints the ports.
"""

from __future__ import annotations

import signal
import ssl
import sys
from contextlib import suppress
from functools import partial
from urllib.parse import parse_qs, urlsplit

import msgspec
import trio

from tests.client.kit import vm

_BACKLOG = 64


def name_of(host: int) -> str:
    """Returns the name of a host, by its number from 1 on."""
    return f"host{host:03}"


def vms_of(host: int, count: int) -> list[dict[str, object]]:
    """Returns the VMs of a host, as the API shows them."""
    return [vm(id=host * 10**9 + number, name=f"{name_of(host)}-vm{number}") for number in range(1, count + 1)]


async def _serve(certificate: str, authority: str, hosts: int, count: int) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=authority)
    context.load_cert_chain(certificate)
    context.verify_mode = ssl.CERT_REQUIRED
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            ports = []
            for host in range(1, hosts + 1):
                shown = [msgspec.json.encode(each) for each in vms_of(host, count)]
                listeners = await trio.open_ssl_over_tcp_listeners(
                    0, context, host="127.0.0.1", https_compatible=True, backlog=_BACKLOG
                )
                (plain,) = (each.transport_listener for each in listeners)
                assert isinstance(plain, trio.SocketListener)
                ports.append(plain.socket.getsockname()[1])
                nursery.start_soon(partial(trio.serve_listeners, partial(_answer, shown), listeners))
            print("listening on", ",".join(map(str, ports)), flush=True)
            async for _ in signals:
                break
            nursery.cancel_scope.cancel()


async def _answer(shown: list[bytes], stream: trio.SSLStream[trio.SocketStream]) -> None:
    """Answers one request on a connection with the whole list, or with its first page."""
    # A host that has read all it wants, or waits no longer, just leaves.
    with suppress(trio.BrokenResourceError):
        async with stream:
            await _answer_one(shown, stream)


async def _answer_one(shown: list[bytes], stream: trio.SSLStream[trio.SocketStream]) -> None:
    head = b""
    while b"\r\n\r\n" not in head:
        data = await stream.receive_some()
        if not data:
            return
        head += data
    query = parse_qs(urlsplit(head.split(b" ", 2)[1].decode()).query)
    page = shown[: int(query["limit"][0])] if "limit" in query else shown
    body = b"[" + b",".join(page) + b"]"
    fields = b"Content-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n" % len(body)
    await stream.send_all(b"HTTP/1.1 200 OK\r\n" + fields + b"\r\n" + body)


if __name__ == "__main__":
    trio.run(_serve, sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
