"""Network 'user': the guest reaches the internet as a user of the host does, but not the host."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import trio

from tests.attackers.exposed_host import LOOPBACK_PORT, METADATA, MULTICAST_GROUPS, PORT
from tests.processes import read_line
from tests.system.kit import REPOSITORY, Daemon, boot, run
from tests.system.netns import Namespace
from volant.client import Client

HOST, OUTSIDE = "198.51.100.1", "198.51.100.2"
"""The addresses of the host and of another machine."""
_S = 20.0
_IN_A_NAMESPACE = (
    "ip link set lo up && ip link add up0 type veth peer name eth0 netns {world} "
    f"&& ip address add {HOST}/24 dev up0 && ip link set up0 up && ip route add default via {OUTSIDE} "
    f"&& nsenter --net=/proc/{{world}}/ns/net ip link set lo up "
    f"&& nsenter --net=/proc/{{world}}/ns/net ip address add {OUTSIDE}/24 dev eth0 "
    "&& nsenter --net=/proc/{world}/ns/net ip link set eth0 up "
    f"&& for address in {' '.join(METADATA)}; do "
    'nsenter --net=/proc/{world}/ns/net ip address add $address/32 dev eth0; done && exec "$@"'
)
"""The host, and a machine behind its uplink, which also has the addresses of cloud metadata services."""
_SERVE = "import http.server, sys; http.server.test(http.server.SimpleHTTPRequestHandler, bind=sys.argv[1], port=8000)"

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root; CI is root"),
    pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed: .ci/system-packages network"),
]


class Behind:
    """The daemon, in a namespace with an address besides loopback and an uplink to the namespace of `world`."""

    def __init__(self, daemon: Daemon, client: Client, world: int) -> None:
        self.daemon = daemon
        self.client = client
        self.world = world

    def inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self.daemon.pid}/ns/net", "--", *command]

    @contextmanager
    def server(self, says: Path) -> Iterator[None]:
        """Serves a directory on the internet side."""
        command = ["nsenter", f"--net=/proc/{self.world}/ns/net", "--", "python3", "-u", "-c", _SERVE, OUTSIDE]
        process = subprocess.Popen(command, cwd=says, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            assert "Serving" in read_line(process)
            yield
        finally:
            process.kill()
            process.communicate(timeout=_S)

    @contextmanager
    def exposed(self, pid: int) -> Iterator[Callable[[], list[str]]]:
        """Services in the namespace of a process, and the data that they received."""
        command = ["nsenter", f"--net=/proc/{pid}/ns/net", "--", sys.executable, "-m", "tests.attackers.exposed_host"]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

        def received() -> list[str]:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
            found: list[str] = json.loads(read_line(process))
            return found

        try:
            assert read_line(process) == "ready\n"
            yield received
        finally:
            process.kill()
            process.communicate(timeout=_S)

    def nft(self, *words: str) -> str:
        done = subprocess.run(self.inside("nft", *words), capture_output=True, text=True, timeout=_S, check=True)
        return done.stdout

    def passts(self) -> list[int]:
        return [pid for pid, tag in self.daemon.processes().items() if tag.startswith(f"{self.daemon.tag_prefix}n.")]


@pytest.fixture
def world() -> Iterator[int]:
    """Returns the process of a network namespace."""
    with closing(Namespace()) as namespace:
        yield namespace.pid


def on_a_host(image_cache: Path, world: int, *, ephemeral: bool = True) -> Daemon:
    wrapper = ("unshare", "--net", "--", "sh", "-c", _IN_A_NAMESPACE.format(world=world), "sh")
    daemon = Daemon(image_cache, wrapper=wrapper, ephemeral=ephemeral)
    daemon.command += ["--listen", f"unix:{daemon.root}/api.sock"]
    return daemon


@pytest.fixture
async def behind(image_cache: Path, world: int) -> AsyncIterator[Behind]:
    daemon = on_a_host(image_cache, world)
    try:
        daemon.start()
        async with Client(daemon.base_url) as client:
            yield Behind(daemon, client, world)
    finally:
        daemon.dispose()


async def test_a_guest_reaches_the_internet_but_not_the_host_and_its_published_ports_work(
    behind: Behind, world: int, tmp_path: Path
) -> None:
    client = behind.client
    (tmp_path / "word").write_text("from the world")
    with (
        behind.server(tmp_path),
        behind.exposed(behind.daemon.pid) as of_the_host,
        behind.exposed(world) as of_metadata,
    ):
        vm = await boot(client, "demo", network="user", ports=("8080:80",))
        assert (vm.network, vm.ip_address) == ("user", "10.0.2.15")
        assert "not filtered" not in vm.network_reason
        fetch = ("wget", "-q", "-T", "5", "-O", "-")
        assert await run(client, "demo", *fetch, f"http://{OUTSIDE}:8000/word") == "from the world"

        # Both services work for another client.
        for address in (HOST, METADATA[0]):
            connect = f"import socket; socket.create_connection(('{address}', {PORT}), timeout=10).recv(7)"
            await trio.run_process(behind.inside("python3", "-c", connect))
        assert (of_the_host(), of_metadata()) == ([f"tcp {PORT}"], [f"tcp {PORT}"])
        await attack(client)
        assert (of_the_host(), of_metadata()) == ([], [])
        # An administrator reloads the host's firewall.
        behind.nft("flush", "ruleset")
        with trio.fail_after(_S):
            while "skuid" not in behind.nft("list", "ruleset"):  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.05)
        await attack(client)
        assert (of_the_host(), of_metadata()) == ([], [])

        await run(
            client, "demo", "sh", "-c", "mkdir /tmp/w && echo from the guest >/tmp/w/word && httpd -p 80 -h /tmp/w"
        )
        ask = "import urllib.request as u; print(u.urlopen('http://127.0.0.1:8080/word', timeout=10).read().decode())"
        got = (await trio.run_process(behind.inside("python3", "-c", ask), capture_stdout=True)).stdout.decode()
        assert got.strip() == "from the guest"

        # A dead passt is restarted, and the hypervisor reconnects, also if the guest has been sending all the time.
        await run(client, "demo", "sh", "-c", f"python3.13 -c '{FLOOD}' >/dev/null 2>&1 & echo $! >/tmp/flood")
        (first,) = behind.passts()
        os.kill(first, signal.SIGKILL)
        with trio.fail_after(60):
            again = f"until {' '.join(fetch)} http://{OUTSIDE}:8000/word; do sleep 0.2; done"
            assert await run(client, "demo", "sh", "-c", again) == "from the world"
        assert behind.passts() not in ([first], [])
        await run(client, "demo", "sh", "-c", "kill $(cat /tmp/flood)")
        await attack(client)
        assert (of_the_host(), of_metadata()) == ([], [])

        # passt has another user than any hypervisor: a hostile hypervisor cannot harm it.
        (passt,) = behind.passts()
        (hypervisor,) = behind.daemon.hypervisors()
        assert user_of(passt) not in (user_of(hypervisor), pwd.getpwnam("nobody").pw_uid)

        await client.vms.stop("demo")
        await client.vms.wait("demo", ("stopped",), timeout_s=60)
        assert behind.passts() == []


def user_of(pid: int) -> int:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:")]
    return int(line.split()[1])


async def attack(client: Client) -> None:
    """Makes the guest try each way to a service of the host, over TCP and UDP."""
    # 10.0.2.2 is the guest's gateway, which passt maps to the host's loopback by default.
    addresses = (HOST, "10.0.2.2", "127.0.0.2", "0.0.0.0", "198.51.100.255", *MULTICAST_GROUPS, *METADATA)
    targets = [(address, port) for address in addresses for port in (PORT, LOOPBACK_PORT)]
    tries = [f"(wget -q -T 2 -O - http://{address}:{port} || true)" for address, port in targets]
    tries += [f"(timeout 2 tftp -g -r x {address} {port} || true)" for address, port in targets]
    await run(client, "demo", "sh", "-c", f"{' & '.join(tries)} & wait")


FLOOD = """
# Packets sent while passt is down must not block the interface for good.
import socket, time
end = time.monotonic() + 60
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
    while time.monotonic() < end:
        try:
            sender.sendto(b"x" * 100, ("198.51.100.2", 9))
        except OSError:
            pass
"""
