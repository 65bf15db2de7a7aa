"""Egress rules with real guests: they reach what the rules allow, whatever they try, and while no daemon runs, too.

The daemon's host is a network namespace. Another one plays the internet: servers at public addresses, and a DNS server
under the test's control. `tests/network/test_egress.py` tests the rules in detail.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import trio

from tests.processes import read_line
from tests.system.kit import REPOSITORY, Daemon, boot, kept, reachable, run
from tests.system.lab import HOST, WORLD, Lab
from tests.system.test_orphans import volar
from volant.client import Client
from volant.model import EgressRule

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root filters what guests send"),
    pytest.mark.skipif(shutil.which("nft") is None, reason="nftables is not installed"),
    pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed"),
    pytest.mark.cold,
]
FIRST, SECOND, THIRD = "45.0.0.1", "45.0.0.2", "45.0.0.3"
"""Public addresses of the world."""
_S = 30.0
SERVE = """
import contextlib, json, socket, sys, threading

accepted = {}

def serve(kind, address, port):
    with socket.socket(socket.AF_INET, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        if kind == socket.SOCK_DGRAM:
            ready.release()
            while True:
                _, sender = sock.recvfrom(100)
                sock.sendto(address.encode(), sender)
        sock.listen()
        accepted[f"{address}:{port}"] = 0
        ready.release()
        while True:
            connection, _ = sock.accept()
            accepted[f"{address}:{port}"] += 1
            with connection, contextlib.suppress(OSError):
                connection.sendall(address.encode())
                # To close a connection that has bytes left resets it, and the client may lose the answer.
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(5)
                while connection.recv(100):
                    pass

ready = threading.Semaphore(0)
for address in sys.argv[1:]:
    for port in (80, 443):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            threading.Thread(target=serve, args=(kind, address, port), daemon=True).start()
            ready.acquire()
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(accepted[json.loads(line)]), flush=True)
"""
"""The internet. Answers a target on its stdin with the number of TCP connections that it has accepted there."""
ATTEMPT = """
import json, socket, sys
answers = []
for target, port, kind in json.loads(sys.argv[1]):
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM) as sock:
        sock.settimeout(6 if kind == "tcp" else 2)
        try:
            sock.connect((target, port))
            sock.sendall(b"?")
            answers.append(sock.recv(100).decode() or None)
        except OSError:
            answers.append(None)
print(json.dumps(answers))
"""
"""In the guest: tries to reach each target, and prints who answers."""
TUNNEL = r"""
import socket, sys
header, name = "4242 0100 0001 0000 0000 0000", b"\x06stolen\x04data\x04evil\x00"
query = bytes.fromhex(header) + name + bytes.fromhex("0001 0001")
for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
    for port in (53, 853):
        with socket.socket(socket.AF_INET, kind) as sock:
            sock.settimeout(2)
            try:
                sock.connect((sys.argv[1], port))
                sock.sendall(query if kind == socket.SOCK_DGRAM else len(query).to_bytes(2, "big") + query)
                print("answered", port, sock.recv(100))
            except OSError:
                pass
"""
MEANWHILE = """
import os, socket, time
answered = set()
until = time.monotonic() + 300
while time.monotonic() < until and not os.path.exists("/tmp/enough"):
    for target in ("{allowed}", "{denied}"):
        try:
            with socket.create_connection((target, 80), timeout=2) as sock:
                answered.add(sock.recv(100).decode())
        except OSError:
            pass
    time.sleep(0.1)
with open("/tmp/unfinished", "w") as file:
    print(*sorted(answered), file=file)
os.rename("/tmp/unfinished", "/tmp/answered")
"""
"""In the guest: tries to reach both targets in turn until a file exists, and writes who has answered."""
ZONE = {
    "allowed.example": {"a": [FIRST], "ttl": 1},
    "other.example": {"a": [THIRD]},
    "cdn.example": {"cname": "edge.example"},
    "edge.example": {"a": [FIRST]},
    "inside.wild.example": {"a": [HOST]},
    "loopback.wild.example": {"a": ["127.0.0.1"]},
}
RULES = (
    EgressRule(name="allowed.example", ports=(80,)),
    EgressRule(name="*.wild.example"),
    EgressRule(cidr=f"{SECOND}/32", ports=(80, "8000-8010")),
)


class EgressLab(Lab):
    """A lab whose internet has servers and names."""

    def __init__(self) -> None:
        super().__init__(FIRST, SECOND, THIRD)
        self._servers = self.start("-c", SERVE, FIRST, SECOND, THIRD)
        self._names = self.start(str(REPOSITORY / "tests/network/dns_server.py"), WORLD)

    def names(self, entries: dict[str, Any]) -> list[str]:
        """Changes the zone of the DNS server. Returns what it was asked for."""
        found: list[str] = ask(self._names, entries)
        return found

    def connections(self, target: str) -> int:
        """Returns how many TCP connections to `ADDRESS:PORT` were accepted so far."""
        return int(ask(self._servers, target))


def ask(process: subprocess.Popen[str], question: object) -> Any:
    """Returns the answer of a program that reads and prints a line of JSON in turn."""
    assert process.stdin is not None
    process.stdin.write(json.dumps(question) + "\n")
    process.stdin.flush()
    return json.loads(read_line(process))


@pytest.fixture(scope="module")
def lab() -> Iterator[EgressLab]:
    with closing(EgressLab()) as lab:
        yield lab


@pytest.fixture(scope="module")
def hosted(image_cache: Any, lab: EgressLab, _running: list[Daemon]) -> Iterator[Daemon]:
    daemon = Daemon(image_cache, "--nameservers", WORLD, wrapper=lab.host.enter, ephemeral=False)
    daemon.command += ["--listen", f"unix:{daemon.root}/api"]
    with kept(daemon, _running):
        yield daemon


@pytest.fixture
def daemon(hosted: Daemon, lab: EgressLab) -> Iterator[Daemon]:
    lab.names(ZONE)
    yield hosted
    hosted.delete_vms()
    assert "-egress" not in lab.host.run("nft", "list", "tables") or "vm-" not in lab.host.run("nft", "list", "ruleset")


async def attempts(client: Client, name: str, *targets: tuple[str, int, str]) -> list[str | None]:
    said = await run(client, name, "python3", "-c", ATTEMPT, json.dumps(targets), timeout_s=120)
    found: list[str | None] = json.loads(said)
    return found


@pytest.mark.parametrize("network", ["bridge", pytest.param("user", marks=pytest.mark.full)])
async def test_a_guest_reaches_only_names_and_addresses_that_its_rules_allow(
    daemon: Daemon, lab: EgressLab, network: str
) -> None:
    async with daemon.client() as client:
        vm = await boot(client, "walled", network=network, egress=RULES)
        assert vm.egress == RULES
        # Addresses that were not resolved.
        targets = [(each, port, kind) for each in (FIRST, THIRD) for port in (80, 443) for kind in ("tcp", "udp")]
        assert await attempts(client, "walled", *targets) == [None] * len(targets)
        assert await attempts(client, "walled", (SECOND, 80, "tcp"), (SECOND, 443, "tcp")) == [SECOND, None]
        # Names.
        assert await attempts(client, "walled", ("allowed.example", 80, "tcp")) == [FIRST]
        assert await attempts(client, "walled", (FIRST, 443, "tcp"), (FIRST, 80, "udp")) == [None, None]
        others = ["other.example", "edge.example", "cdn.example", "inside.wild.example", "loopback.wild.example"]
        assert await attempts(client, "walled", *((each, 80, "tcp") for each in others)) == [None] * len(others)
        # Tunnels to other resolvers.
        for server in (WORLD, THIRD):
            assert await run(client, "walled", "python3", "-c", TUNNEL, server, timeout_s=60) == ""
        asked = set(lab.names({}))
        assert {each.removesuffix("/tcp") for each in asked} <= {
            "allowed.example", "inside.wild.example", "loopback.wild.example",
        }  # fmt: skip
        # The name moves.
        lab.names({"allowed.example": {"a": [THIRD], "ttl": 1}})
        with trio.fail_after(_S * 2):
            while await attempts(client, "walled", ("allowed.example", 80, "tcp")) != [THIRD]:  # noqa: ASYNC110
                await trio.sleep(0.2)
        found = volar(daemon, "vms", "inspect", "walled")["egress"]
        assert found["problem"] is None
        assert found["denied_connections"] >= 8
        assert {(THIRD, 443, "tcp"), (THIRD, 443, "udp")} <= {
            (each["address"], each["port"], each["protocol"]) for each in found["denied_destinations"]
        }
        assert {"other.example", "inside.wild.example"} <= {each["name"] for each in found["denied_names"]}
        await run(client, "walled", "ping", "-c", "1", "-W", "3", "127.0.0.1")
        pings = f"ping -c 1 -W 2 {FIRST} >/dev/null 2>&1 && echo yes || echo no"
        assert await run(client, "walled", "sh", "-c", pings) == "no\n"


@pytest.mark.full
@pytest.mark.parametrize("network", ["bridge", "user"])
async def test_rules_hold_while_no_daemon_runs_and_after_it(daemon: Daemon, lab: EgressLab, network: str) -> None:
    async with daemon.client() as client:
        vm = await boot(client, "walled", network=network, egress=RULES)
        script = MEANWHILE.format(allowed=SECOND, denied=THIRD)
        await run(client, "walled", "sh", "-c", f"python3 -c '{script}' </dev/null >/dev/null 2>&1 &")
    denied = lab.connections(f"{THIRD}:80")
    daemon.kill()
    allowed = lab.connections(f"{SECOND}:80")
    # The first may have begun before, and the guest tries the other target between two of them.
    with trio.fail_after(_S):
        while lab.connections(f"{SECOND}:80") < allowed + 3:  # noqa: ASYNC110 - another process's connections
            await trio.sleep(0.1)
    assert not daemon.runs
    async with daemon.started() as client:
        await reachable(client, "walled")
        assert (await client.vms.get("walled")).pid == vm.pid
        await run(client, "walled", "touch", "/tmp/enough")
        with trio.fail_after(_S * 2):
            answered = ""
            while not answered:
                answered = await run(client, "walled", "sh", "-c", "cat /tmp/answered 2>/dev/null || true")
                await trio.sleep(0.2)
        assert answered == f"{SECOND}\n"
        assert lab.connections(f"{THIRD}:80") == denied
        assert await attempts(client, "walled", ("allowed.example", 80, "tcp"), ("other.example", 80, "tcp")) == [
            FIRST,
            None,
        ]
