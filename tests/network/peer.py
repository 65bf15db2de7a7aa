"""A machine with a network namespace of its own: a process that runs commands, one JSON a line.

`python peer.py [TAP]`: with a tap it is a guest. It has the tap open, as a hypervisor has, and copies frames between it
and the NIC `eth0`. Without a tap it is an empty namespace that receives a link. It ends when its stdin is closed.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib
import itertools
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_TAP_FLAGS = 0x0002 | 0x1000
_ANSWER_S = 5.0
_REFUSED_S = 0.7
_KEPT = 1000

frames: list[bytes] = []
"""The last frames that the guest's NIC received."""
came = threading.Condition()
begun: list[socket.socket] = []
tap = -1


def open_tap(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_FLAGS))
    return fd


def splice(nic: int) -> None:
    """Copies frames between the host's tap and the guest's NIC."""
    while True:
        readable, _, _ = select.select([tap, nic], [], [])
        for source in readable:
            try:
                frame = os.read(source, 65536)
            except OSError:
                # The tap was taken away.
                return
            if source == tap:
                with came:
                    frames.append(frame)
                    del frames[:-_KEPT]
                    came.notify_all()
            # The NIC is down until it is configured.
            with suppress(OSError):
                os.write(nic if source == tap else tap, frame)


def configure(name: str, mac: str, address: str, gateway: str) -> None:
    """Sets the NIC's addresses and its default route."""
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        (index,) = ipr.link_lookup(ifname=name)
        ipr.link("set", index=index, state="down")
        if mac:
            ipr.link("set", index=index, address=mac)
        ipr.flush_addr(index=index)
        ip, _, prefix = address.partition("/")
        ipr.addr("add", index=index, address=ip, prefixlen=int(prefix))
        ipr.link("set", index=index, state="up")
        ipr.link("set", index=ipr.link_lookup(ifname="lo")[0], state="up")
        if gateway:
            ipr.route("add", dst="default", gateway=gateway)


def serve(protocol: str, host: str, port: int, says: str) -> None:
    """Answers each client with a word and the client's address."""
    if protocol == "udp":
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host, port))

        def answer() -> None:
            while True:
                _, sender = sock.recvfrom(1000)
                sock.sendto(f"{says} {sender[0]}".encode(), sender)

    else:
        sock = socket.create_server((host, port))

        def answer() -> None:
            while True:
                connection, (who, _) = sock.accept()
                with connection:
                    connection.sendall(f"{says} {who}".encode())

    threading.Thread(target=answer, daemon=True).start()


def ask(protocol: str, host: str, port: int, wait_s: float = _ANSWER_S, bind: str = "") -> str:
    """Returns the answer of a server; empty without any in time."""
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.settimeout(wait_s)
        try:
            if bind:
                sock.bind((bind, 0))
            sock.connect((host, port))
            if protocol == "udp":
                sock.send(b"?")
            return sock.recv(1000).decode()
        except OSError:
            return ""


def say(host: str, port: int, text: str) -> bool:
    """Sends a datagram, also broadcast and multicast. Returns whether the kernel accepted it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 8)
        try:
            return sock.sendto(text.encode(), (host, port)) > 0
        except OSError:
            return False


def echo(host: str, port: int) -> None:
    """Echoes what each client sends, until the client closes."""
    server = socket.create_server((host, port))

    def carry(connection: socket.socket) -> None:
        with connection:
            while data := connection.recv(1000):
                connection.sendall(data)

    def accept() -> None:
        while True:
            connection, _ = server.accept()
            threading.Thread(target=carry, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()


def begin(host: str, port: int) -> None:
    """Opens a connection that stays open."""
    begun.append(socket.create_connection((host, port), _ANSWER_S))


def go_on() -> str:
    """Sends something on it and returns the echo."""
    begun[0].sendall(b"again")
    return begun[0].recv(1000).decode()


def route(subnet: str, gateway: str) -> None:
    """Adds a route."""
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        ipr.route("add", dst=subnet, gateway=gateway)


def add_address(name: str, address: str) -> None:
    """Adds an address to a NIC."""
    from pyroute2 import IPRoute

    with IPRoute() as ipr:
        ip, _, prefix = address.partition("/")
        ipr.addr("add", index=ipr.link_lookup(ifname=name)[0], address=ip, prefixlen=int(prefix))


def connects(host: str, port: int, wait_s: float = 2.0) -> bool:
    """Returns whether a TCP connection is made."""
    try:
        socket.create_connection((host, port), wait_s).close()
    except OSError:
        return False
    return True


def refused(protocol: str, host: str, port: int) -> bool:
    """Returns whether nothing answers there."""
    return ask(protocol, host, port, _REFUSED_S) == ""


def ping(host: str, wait_s: float = _ANSWER_S) -> bool:
    """Returns whether it answers."""
    ident = os.getpid() & 0xFFFF
    total = 0x0800 + ident + 1
    packet = struct.pack("!BBHHH", 8, 0, ~(total + (total >> 16)) & 0xFFFF, ident, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(wait_s)
        until = time.monotonic() + wait_s
        try:
            sock.sendto(packet, (host, 0))
            while time.monotonic() < until:
                data, (who, _) = sock.recvfrom(1000)
                if who == host and data[20] == 0 and data[24:26] == ident.to_bytes(2, "big"):
                    return True
        except OSError:
            pass
    return False


def send_frame(*frames: str) -> None:
    """Sends raw frames, as a guest with a manipulated kernel can."""
    for frame in frames:
        os.write(tap, bytes.fromhex(frame))


def wait_for_frame(part: str, wait_s: float = _ANSWER_S) -> bool:
    """Returns whether a frame with these bytes arrives."""
    wanted = bytes.fromhex(part)
    with came:
        return came.wait_for(lambda: any(wanted in frame for frame in frames), wait_s)


def has_frame(part: str) -> bool:
    """Returns whether one has arrived."""
    with came:
        return any(bytes.fromhex(part) in frame for frame in frames)


def _dns_server() -> Any:
    # This program's directory is where Python looks first.
    return importlib.import_module("dns_server")


def dns_serve(host: str) -> None:
    """Serves the zone of `dns_server`."""
    _dns_server().serve(host)


def dns_zone(entries: dict[str, Any]) -> list[str]:
    """Changes the zone. Returns the names that were asked for."""
    found: list[str] = _dns_server().change(entries)
    return found


def resolve(name: str, server: str, kind: str = "A", protocol: str = "udp", wait_s: float = 15.0) -> list[str]:
    """Returns the addresses of a name, or the code of the answer; `none` without an answer."""
    import dns.exception
    import dns.message
    import dns.query
    import dns.rcode

    query = dns.message.make_query(name, kind, use_edns=0)
    asked = dns.query.udp if protocol == "udp" else dns.query.tcp
    try:
        reply = asked(query, server, timeout=wait_s)
    except (OSError, EOFError, dns.exception.DNSException):
        return ["none"]
    found = [record.to_text() for rrset in reply.answer for record in rrset]
    return found or [dns.rcode.to_text(reply.rcode())]


def flood(server: str, seconds: float) -> int:
    """Sends queries and garbage to a DNS server as fast as it can. Returns how many the kernel accepted."""
    import dns.message

    query = dns.message.make_query("x.allowed.example", "A").to_wire()
    parts = [
        query,
        query[:12],
        b"\xff" * 300,
        query[:-4] + b"\xc0\x0c\0\1\0\1",
        b"",
        query * 8,
        query[:4] + b"\xff" * 8,
    ]
    sent, until = 0, time.monotonic() + seconds
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for part in itertools.cycle(parts):
            if time.monotonic() >= until:
                break
            with suppress(OSError):
                sock.sendto(part, (server, 53))
                sent += 1
    return sent


CALLS: tuple[Callable[..., Any], ...] = (
    configure,
    add_address,
    route,
    serve,
    echo,
    ask,
    say,
    connects,
    refused,
    ping,
    begin,
    go_on,
    send_frame,
    wait_for_frame,
    has_frame,
    dns_serve,
    dns_zone,
    resolve,
    flood,
)


def main() -> None:
    global tap
    names = sys.argv[1:]
    if names:
        tap = open_tap(names[0])
    if ctypes.CDLL(None).unshare(_CLONE_NEWNET) != 0:
        raise SystemExit("unshare failed")
    if names:
        nic = open_tap("eth0")
        threading.Thread(target=splice, args=(nic,), daemon=True).start()
    print("ready", flush=True)
    calls = {call.__name__: call for call in CALLS}
    for line in sys.stdin:
        name, args = json.loads(line)
        try:
            print(json.dumps({"value": calls[name](*args)}), flush=True)
        except Exception as error:
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


if __name__ == "__main__":
    main()
