"""A DNS server under a test's control, honest or not.

`python dns_server.py ADDRESS`: each line of stdin is JSON that changes the zone, and is answered with the names that
were asked for so far. It ends when its stdin is closed.
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import threading
import time
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rrset

zone: dict[str, dict[str, Any]] = {}
"""By name: `a` (addresses), `ttl`, `cname`, or `does`: what it does instead."""
asked: list[str] = []


def serve(address: str) -> None:
    """Answers on port 53 of an address."""
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind((address, 53))
    tcp = socket.create_server((address, 53))
    threading.Thread(target=_serve_udp, args=(udp,), daemon=True).start()
    threading.Thread(target=_serve_tcp, args=(tcp,), daemon=True).start()


def change(entries: dict[str, dict[str, Any]]) -> list[str]:
    """Changes entries of the zone. Returns the names that were asked for."""
    zone.update(entries)
    return list(asked)


def _serve_udp(sock: socket.socket) -> None:
    while True:
        data, sender = sock.recvfrom(4096)
        for answer in _answers(data, tcp=False):
            sock.sendto(answer, sender)


def _serve_tcp(sock: socket.socket) -> None:
    while True:
        connection, _ = sock.accept()
        with connection:
            connection.settimeout(5)
            try:
                (length,) = struct.unpack("!H", connection.recv(2))
                for answer in _answers(connection.recv(length), tcp=True):
                    connection.sendall(struct.pack("!H", len(answer)) + answer)
            except (OSError, struct.error):
                pass


def _answers(data: bytes, *, tcp: bool) -> list[bytes]:
    query = dns.message.from_wire(data)
    name = query.question[0].name.to_text(omit_final_dot=True).lower()
    asked.append(f"{name}/tcp" if tcp else name)
    entry = zone.get(name, {})
    reply = dns.message.make_response(query)
    if not entry:
        reply.set_rcode(dns.rcode.NXDOMAIN)
    follow: dict[str, Any] | None = entry
    owner = name
    while follow is not None:
        ttl = follow.get("ttl", 300)
        target = follow.get("cname")
        if target is None:
            if follow.get("a"):
                reply.answer.append(dns.rrset.from_text(f"{owner}.", ttl, "IN", "A", *follow["a"]))
            break
        reply.answer.append(dns.rrset.from_text(f"{owner}.", ttl, "IN", "CNAME", f"{target}."))
        # A server that is no resolver answers what it knows, and stops.
        owner, follow = target, None if follow.get("does") == "stop" else zone.get(target)
    wire = reply.to_wire(max_size=65535)
    honest = data[:2] + wire[2:]
    match entry.get("does"):
        case "silent":
            return []
        case "garbage":
            return [data[:2] + b"\xff" * 200]
        case "compression loop":
            return [data[:2] + struct.pack("!5H", 0x8180, 1, 1, 0, 0) + data[12:] + b"\xc0\x0c" + b"\xc0\xff" * 8]
        case "self-pointer":
            at = 12
            return [data[:2] + struct.pack("!5H", 0x8180, 1, 0, 0, 0) + struct.pack("!H", 0xC000 | at) + b"\0\1\0\1"]
        case "wrong id":
            return [bytes([data[0] ^ 1]) + honest[1:]]
        case "wrong id first":
            return [bytes([data[0] ^ 1]) + honest[1:].replace(b"\x2d\0\0", b"\x2d\xff\xff"), honest]
        case "other name":
            other = dns.message.make_response(dns.message.make_query("other.example", "A", id=query.id))
            other.answer.append(dns.rrset.from_text("other.example.", 60, "IN", "A", "45.0.0.9"))
            return [other.to_wire()]
        case "late":
            time.sleep(4)
            return [honest]
        case "truncated" if not tcp:
            reply.answer.clear()
            reply.flags |= dns.flags.TC
            return [reply.to_wire()]
        case "huge":
            if not tcp:
                reply.answer.clear()
                reply.flags |= dns.flags.TC
                return [reply.to_wire()]
            return [data[:2] + b"\0" * 60000]
        case "refuses":
            reply.set_rcode(dns.rcode.REFUSED)
            return [reply.to_wire()]
    return [honest]


def main() -> None:
    serve(sys.argv[1])
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(change(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
