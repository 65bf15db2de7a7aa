"""A host that exposes services on its bridge: on broadcast, multicast, its own addresses and loopback.

The services listen in the network namespace of the calling process. They note each datagram and each connection, so
that a test can tell which attempts arrived.

`python -m tests.attackers.exposed_host` runs them in a process of their own: it prints `ready`, and answers each line
of stdin with what was received since the last one, as a JSON list. It ends when its stdin does.
"""

from __future__ import annotations

import json
import selectors
import socket
import struct
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

MULTICAST_GROUPS = ("224.0.0.1", "224.0.0.251", "239.255.255.250")
"""All hosts, mDNS, SSDP."""
MULTICAST_GROUPS_IPV6 = ("ff02::1", "ff02::fb")
PORT = 5300
LOOPBACK_PORT = 6379
METADATA = (
    "169.254.169.254",
    "169.254.42.42",
    "168.63.129.16",
    "100.100.100.200",
    "192.0.0.192",
)
"""Metadata services with credentials: of most clouds, Scaleway, Azure, Alibaba, Oracle Classic."""


class ExposedHost:
    """Records what the services received; thread-safe."""

    def __init__(self) -> None:
        self._received: list[str] = []
        self._lock = threading.Lock()

    def note(self, text: str) -> None:
        with self._lock:
            self._received.append(text)

    def received(self) -> list[str]:
        """Returns and clears the texts of all datagrams, and `tcp PORT` for each connection, in order."""
        with self._lock:
            received, self._received = self._received, []
        return received

    def drain(self, sockets: Sequence[socket.socket]) -> None:
        """Records datagrams that are queued at the sockets."""
        for sock in sockets:
            while True:
                try:
                    data = sock.recv(2000)
                except BlockingIOError:
                    break
                self.note(data.rstrip(b"\0").decode(errors="replace"))


class _Udp:
    """Datagram services. The kernel queues a datagram before the sender's call returns, so tests need not wait."""

    def __init__(self, stack: ExitStack, addresses: Sequence[str]) -> None:
        self.sockets: list[socket.socket] = []
        everybody = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        everybody.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        everybody.bind(("", PORT))
        for group in MULTICAST_GROUPS:
            for address in addresses:
                everybody.setsockopt(
                    socket.IPPROTO_IP,
                    socket.IP_ADD_MEMBERSHIP,
                    socket.inet_aton(group) + socket.inet_aton(address),
                )
        loopback = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        loopback.bind(("127.0.0.1", LOOPBACK_PORT))
        self.sockets += [everybody, loopback]
        for sock in self.sockets:
            sock.setblocking(False)

    def listen_ipv6(self, stack: ExitStack, links: Sequence[str]) -> None:
        sock = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("::", PORT))
        for group in MULTICAST_GROUPS_IPV6:
            for link in links:
                index = struct.pack("@I", socket.if_nametoindex(link))
                membership = socket.inet_pton(socket.AF_INET6, group) + index
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, membership)
        sock.setblocking(False)
        self.sockets.append(sock)


class Services:
    """Controls a running exposed host."""

    def __init__(self, host: ExposedHost, udp: _Udp) -> None:
        self._host = host
        self._udp = udp

    def received(self) -> list[str]:
        """Returns the texts of all datagrams, and `tcp PORT` for each connection, since the last call."""
        self._host.drain(self._udp.sockets)
        return self._host.received()


@contextmanager
def exposed_host(addresses: Sequence[str], ipv6_links: Sequence[str] = ()) -> Iterator[Services]:
    """Run the services in this network namespace.

    :param addresses: the host's own addresses, on whose links it joins the multicast groups
    :param ipv6_links: links on which it joins IPv6 groups too
    """
    host = ExposedHost()
    with ExitStack() as stack:
        udp = _Udp(stack, addresses)
        udp.listen_ipv6(stack, ipv6_links)
        selector = stack.enter_context(selectors.DefaultSelector())
        for address, port in (("0.0.0.0", PORT), ("127.0.0.1", LOOPBACK_PORT)):
            server = stack.enter_context(socket.create_server((address, port)))
            selector.register(server, selectors.EVENT_READ, port)
        wake, stop = socket.socketpair()
        stack.callback(wake.close)
        selector.register(wake, selectors.EVENT_READ, None)

        def accept() -> None:
            while True:
                for key, _ in selector.select():
                    if key.data is None:
                        return
                    assert isinstance(key.fileobj, socket.socket)
                    connection, _ = key.fileobj.accept()
                    host.note(f"tcp {key.data}")
                    with connection:
                        connection.sendall(b"exposed")

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        stack.callback(thread.join, 5)
        stack.callback(stop.close)
        yield Services(host, udp)


if __name__ == "__main__":
    with exposed_host(()) as services:
        print("ready", flush=True)
        for _ in sys.stdin:
            print(json.dumps(services.received()), flush=True)
