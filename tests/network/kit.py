"""Builds rows and a small internet: this network namespace is the host, with an uplink to another one."""

from __future__ import annotations

import json
import select
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path
from typing import Any

import msgspec
from pyroute2 import IPRoute

from actors import ONE_FOR_ONE, Child, Ref, Supervisor, open_system
from volant.host import Host, user_of_passt, users_of_restricted_passt
from volant.model import BASE, Phase, Status, VmRow, allocate, user_lease
from volant.model._network import parse_port
from volant.network import HostNetwork, NetworkBackend, NetworkKeeper, Networks, NetworkSettings, Passt, Resolvers

INSTANCE = "0123456789"
SUBNET = IPv4Network("10.87.0.0/24")
SETTINGS = NetworkSettings(instance=INSTANCE, subnet=SUBNET)
WORLD = "198.51.100.2"
UPLINK = "198.51.100.1"
VM_USERS = range(65536, 98304)
"""Users of a daemon's sandboxes, as a daemon of root has them."""
PASST_USER = user_of_passt(VM_USERS)
RESTRICTED_USERS = users_of_restricted_passt(VM_USERS)
"""Users of passts of VMs with an egress policy."""
_NOW = datetime(2026, 1, 1, tzinfo=UTC)
_PEER = Path(__file__).with_name("peer.py")
_CALL_S = 30.0


def vm(
    vm_id: int,
    network: str = "bridge",
    *ports: str,
    instance: str = INSTANCE,
    subnet: IPv4Network = SUBNET,
    **fields: Any,
) -> VmRow:
    """Returns the row of a running VM. VM 1 has the first address, and so on."""
    taken = {str(subnet.network_address + number + 1) for number in range(1, vm_id)}
    return VmRow(
        id=vm_id,
        name=f"vm{vm_id}",
        cpu_cores=1,
        memory_mb=64,
        plugin="base",
        runtime="base",
        manifest=BASE,
        created_at=_NOW,
        updated_at=_NOW,
        network=network,
        lease=allocate(subnet, taken, instance=instance, vm_id=vm_id),
        ports=tuple(map(parse_port, ports)),
        **{"status": Status.RUNNING, "tag": f"volant-{instance}-{vm_id}.1", **fields},
    )


def user_vm(vm_id: int, **fields: Any) -> VmRow:
    """Returns the row of a running VM behind passt."""
    return msgspec.structs.replace(vm(vm_id, **fields), network="user", lease=user_lease(INSTANCE, vm_id))


def stopped(row: VmRow) -> VmRow:
    """Returns the row of the same VM while its process is being killed."""
    return msgspec.structs.replace(row, status=Status.STOPPING, phase=Phase.KILL)


class Peer:
    """Controls another machine; see `peer.py`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return self._process.pid

    def __call__(self, name: str, *args: object) -> Any:
        """Runs a command on the machine and returns its result."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([name, args]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._line())
        if "error" in answer:
            raise AssertionError(f"{name}{args}: {answer['error']}")
        return answer["value"]

    def _line(self) -> str:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], _CALL_S)[0]:
            raise AssertionError("a peer does not answer")
        line = self._process.stdout.readline()
        if not line:
            raise AssertionError(f"a peer has ended with {self._process.wait()}")
        return line


@contextmanager
def peer(*args: str) -> Iterator[Peer]:
    """Starts a machine with a network namespace of its own."""
    process = subprocess.Popen(
        [sys.executable, str(_PEER), *args], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        found = Peer(process)
        assert found._line() == "ready\n"
        yield found
    finally:
        process.kill()
        process.communicate()


class World:
    """The host, where this process runs, and the world behind its uplink, which has no route to any guest."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self.rows: list[VmRow] = []
        self.world = self.machine("up0", f"{UPLINK}/24", f"{WORLD}/24")
        with IPRoute() as ipr:
            ipr.link("set", index=ipr.link_lookup(ifname="lo")[0], state="up")
            ipr.route("add", dst="default", gateway=WORLD)

    def machine(self, name: str, address: str, its_address: str) -> Peer:
        """Adds a machine at the other end of the link `name`."""
        there = self._stack.enter_context(peer())
        with IPRoute() as ipr:
            ipr.link("add", ifname=name, kind="veth", peer={"ifname": "eth0", "net_ns_fd": f"/proc/{there.pid}/ns/net"})
            (index,) = ipr.link_lookup(ifname=name)
            ip, _, prefix = address.partition("/")
            ipr.addr("add", index=index, address=ip, prefixlen=int(prefix))
            ipr.link("set", index=index, state="up")
        there("configure", "eth0", "", its_address, "")
        return there

    def networks(
        self,
        settings: NetworkSettings = SETTINGS,
        backend: NetworkBackend | None = None,
        passt: Passt | None = None,
        resolvers: Resolvers | None = None,
    ) -> Networks:
        """Returns the networks of a daemon with `rows`."""
        return Networks(backend or HostNetwork(Host()), settings, lambda: self.rows, passt, resolvers)

    def foreign_port(self, name: str, mac: str, address: str) -> Peer:
        """Adds a machine to the bridge that the daemon does not know."""
        with IPRoute() as ipr:
            ipr.link("add", ifname=name, kind="tuntap", mode="tap")
            (bridge,) = ipr.link_lookup(ifname=SETTINGS.bridge_name)
            ipr.link("set", index=ipr.link_lookup(ifname=name)[0], master=bridge, state="up")
        there = self._stack.enter_context(peer(name))
        there("configure", "eth0", mac, address, "")
        return there

    def guest(self, row: VmRow) -> Peer:
        """Starts a VM's guest, whose tap exists."""
        lease = row.lease
        assert lease is not None
        guest = self._stack.enter_context(peer(lease.tap))
        guest("configure", "eth0", lease.mac, f"{lease.address}/{lease.prefix}", lease.gateway)
        return guest


@contextmanager
def a_world(forwarding: bool = False) -> Iterator[World]:
    """Sets up a host with an uplink. `forwarding`: whether it already forwards packets."""
    switch("ipv4/ip_forward", str(int(forwarding)))
    with ExitStack() as stack:
        yield World(stack)


def address(row: VmRow) -> str:
    """Returns the address of a VM with a lease."""
    assert row.lease is not None
    return row.lease.address


def links() -> set[str]:
    """Returns the names of all links."""
    return {name for _, name in socket.if_nameindex()}


def switch(name: str, to: str | None = None) -> str | None:
    """Sets a switch below `net` if `to` is given, and returns its value; None if it does not exist."""
    path = Path("/proc/sys/net") / name
    if to is not None:
        path.write_text(to)
    return path.read_text().strip() if path.exists() else None


def ruleset() -> str:
    """Returns the whole firewall without its counters."""
    return subprocess.run(["nft", "-s", "list", "ruleset"], check=True, capture_output=True, text=True).stdout


def nft(rules: str) -> None:
    """Loads rules directly."""
    subprocess.run(["nft", "-f", "-"], input=rules, check=True, text=True)


_ANSWERED = """
import json, socket, sys
targets, protocols, timeout_s = map(json.loads, sys.argv[1:])
kinds = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}
answered = []
for host, port in targets:
    for protocol in protocols:
        with socket.socket(socket.AF_INET, kinds[protocol]) as sock:
            sock.settimeout(timeout_s)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            try:
                sock.connect((host, port))
                sock.send(b"attack")
                if sock.recv(100):
                    answered.append([host, port, protocol])
            except OSError:
                pass
print(json.dumps(answered))
"""


def of_user(user: int, code: str, *arguments: object) -> str:
    """Returns the output of a Python program that runs as a user of the host."""
    done = subprocess.run(
        ["/usr/bin/python3", "-I", "-c", code, *map(str, arguments)],
        user=user, group=65534, extra_groups=(), cwd="/", capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return done.stdout


def answered(
    user: int, *targets: tuple[str, int], protocols: Sequence[str] = ("tcp", "udp"), timeout_s: float = 0.5
) -> list[list[object]]:
    """Returns the address, port and protocol of each server that answers a user of the host.

    :param timeout_s: of each attempt
    """
    found: list[list[object]] = json.loads(of_user(user, _ANSWERED, *map(json.dumps, (targets, protocols, timeout_s))))
    return found


@asynccontextmanager
async def keeper(networks: Networks) -> AsyncIterator[Ref[Any]]:
    """Runs the actor that keeps the networks of a daemon."""
    child = Child("network", partial(NetworkKeeper, networks), shutdown_s=60)
    async with open_system(Supervisor(ONE_FOR_ONE, children=[child])):
        yield child.ref


async def having(networks: Networks, *rows: VmRow) -> None:
    """Sets up the taps of all these VMs."""
    assert await networks.ensure({row.id for row in rows}) == {}


async def with_vm(world: World) -> tuple[VmRow, Peer]:
    """Sets up one VM on the bridge; returns its row and its guest."""
    (row,) = world.rows = [vm(1)]
    await having(world.networks(), row)
    return row, world.guest(row)


def mac(row: VmRow) -> str:
    assert row.lease is not None
    return row.lease.mac


def ethernet(to: str, sender: str, kind: int, payload: bytes) -> str:
    """Returns a frame."""
    header = bytes.fromhex((to + sender).replace(":", "")) + struct.pack("!H", kind)
    return (header + payload).ljust(60, b"\0").hex()
