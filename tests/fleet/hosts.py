"""Hosts of a fleet: a real etcd, and a `volantd` with a state of its own for each."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import trio

from tests.fleet.cluster import Cluster, cluster
from tests.ports import free_port
from tests.system.kit import Daemon, cache_dir

TTL_S = 6
READY_S = 60.0
NO_BOOT = ("--kernel", __file__, "--initramfs", __file__)
"""Flags of daemons whose VMs crash before they take any time."""


class HostOfFleet:
    """A host, and its daemon."""

    def __init__(self, name: str, cluster: Cluster, directory: Path, *flags: str, template: Path | None = None) -> None:
        assert cluster.authority is not None
        self.name = name
        certificate = cluster.authority.issue(f"{name}.example", client=True, server=True)
        self.port = free_port()
        self.daemon = Daemon(
            cache_dir(),
            *("--fleet-etcd", ",".join(cluster.settings().endpoints), "--fleet-host", name),
            *("--fleet-listen", f"127.0.0.1:{self.port}", "--fleet-ttl-s", str(TTL_S)),
            *("--fleet-cert", str(certificate), "--fleet-ca", str(cluster.authority.path)),
            *flags,
            template=template,
            ephemeral=False,
        )
        del directory

    @asynccontextmanager
    async def http(self) -> AsyncIterator[httpx.AsyncClient]:
        async with self.daemon.http() as http:
            http.headers.update(self.daemon.headers)
            yield http


class FleetOfHosts:
    """Several hosts with one etcd."""

    def __init__(self, cluster: Cluster, hosts: list[HostOfFleet]) -> None:
        self.cluster = cluster
        self.hosts = hosts

    def __getitem__(self, name: str) -> HostOfFleet:
        return next(host for host in self.hosts if host.name == name)

    async def up(self, *names: str) -> None:
        """Waits until each host knows that these are up, all by default."""
        wanted = set(names) or {host.name for host in self.hosts}
        for host in self.hosts:
            if host.name in wanted:
                await self.sees(
                    host.name, lambda found: {each["name"] for each in found if each["state"] == "up"} == wanted
                )

    async def sees(self, name: str, holds: Any) -> None:
        """Waits until a host sees the fleet in a certain way."""
        found: Any = None
        with trio.move_on_after(READY_S):
            async with self[name].http() as http:
                while True:
                    found = (await http.get("/api/v1/hosts")).json()
                    if holds(found):
                        return
                    await trio.sleep(0.05)
        raise AssertionError(f"{name} sees {found}")


@contextmanager
def fleet(
    directory: Path,
    *names: str,
    members: int = 1,
    flags: Sequence[str] = (),
    late: Sequence[str] = (),
    template: Path | None = None,
) -> Iterator[FleetOfHosts]:
    """Starts hosts with these names; await `up` before the first request. `flags`: of all daemons;
    `late`: hosts that the test starts itself; `template`: as of `Daemon`"""
    with ExitStack() as stack:
        etcd = stack.enter_context(cluster(directory, members, tls=True))
        hosts = []
        for name in names:
            host = HostOfFleet(name, etcd, directory, *flags, template=template)
            stack.callback(host.daemon.discard)
            hosts.append(host)
        for host in hosts:
            if host.name not in late:
                host.daemon.start()
        yield FleetOfHosts(etcd, hosts)
        for host in hosts:
            host.daemon.dispose()


async def tool(http: httpx.AsyncClient, name: str, /, **arguments: Any) -> Any:
    """Calls a tool over MCP, and returns its result, or the text of its error."""
    result = await message(http, "tools/call", {"name": name, "arguments": arguments})
    return result["content"][0]["text"] if result.get("isError") else result["structuredContent"]


async def message(http: httpx.AsyncClient, method: str, params: Any) -> Any:
    """Sends a message of MCP, and returns its result."""
    headers = {"Accept": "application/json, text/event-stream", "MCP-Protocol-Version": "2025-06-18"}
    content = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
    answer = await http.post("/api/v1/mcp", json=content, headers=headers)
    found = re.search(r"^data: (.*)$", answer.text, re.MULTILINE)
    return json.loads(found[1] if found else answer.text)["result"]
