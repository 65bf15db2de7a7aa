"""What a host does with requests that another one has to answer."""

from __future__ import annotations

import ssl
from base64 import b64encode
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
import trio

from tests.certificates import Authority
from volant.channel import AgentUnreachable
from volant.fleet import CALLER, Fleet, Forwarded, Peers, forwarded_in
from volant.http import Access, ApiSettings, Call, Limits
from volant.mcp import Subjects
from volant.model import Caller, HostView, Key, Problem, Role
from volant.operations import TABLE
from volant.relay import Relay
from volant.routing import Router

VIEWER = Caller("7", "key 7", role=Role.VIEWER, project="web")
ADMIN = Forwarded(Caller("1", "key 1", role=Role.ADMIN))


class Owners:
    """Which host has each name of one kind."""

    def __init__(self) -> None:
        self.of: dict[Key, str] = {}

    def owner(self, key: Key) -> str | None:
        return self.of.get(key)

    async def find(self, key: Key) -> str | None:
        await trio.lowlevel.checkpoint()
        return self.of.get(key)


class Hosts:
    """Other hosts, each with room or without, which are asked in the order of their names."""

    def __init__(self, **has_room: bool) -> None:
        self.host, self.left = "h0", False
        self.has_room = has_room
        self.names = {kind: Owners() for kind in ("vms", "snapshots", "volumes")}
        self.asked: list[str] = []
        self.headers: Sequence[tuple[bytes, bytes]] = ()
        self.peers = Peers(ssl.create_default_context(), lambda name: "h.example:1")

    def hosts(self) -> list[HostView]:
        return [
            HostView(
                name=name, state="up", draining_since=None, address="", version="", architecture="x86_64",
                accelerator=None, cpu_cores=1, memory_mb=1000, zone="", labels={}, vms=0, used_cpu_cores=0,
                free_memory_mb=1000, free_disk_mb=1000,
            )
            for name in self.has_room
        ]  # fmt: skip

    def labels_on(self, host: str, project: str) -> list[dict[str, str]]:
        return []

    def is_up(self, host: str) -> bool:
        return True

    def has(self, host: str, kind: str, *names: str) -> None:
        """Lets a host own names in the project of the client."""
        self.names[kind].of |= dict.fromkeys((Key("web", name) for name in names), host)

    async def run(self, call: Call, client: Any, server: Any, *, explain: Any = None, **more: Any) -> None:
        """Stands in for the relay."""
        name = server.name.removeprefix("host ")
        self.asked.append(name)
        self.headers = server.request_headers(call.scope["headers"])
        if not self.has_room[name]:
            problem = explain and explain(503, b'{"type": "urn:volant:error:no-capacity", "detail": "full"}')
            raise problem or Problem(503, "no-capacity", "full")

    async def route(self, method: str, path: str, *headers: tuple[bytes, bytes], body: bytes = b"") -> bool:
        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            raise AssertionError(message)

        state = {"caller": VIEWER, "request_id": "r1", "project": "web", "names_project": False}
        scope = {
            "type": "http", "method": method, "path": path, "raw_path": path.encode(),
            "query_string": b"", "client": ("127.0.0.1", 1),
            "headers": [(b"host", b"localhost"), *headers], "state": state,
        }  # fmt: skip
        share: Any = SimpleNamespace(take=lambda size: None)
        router = Router(
            cast(Fleet, self),
            Access(ApiSettings()),
            cast(Relay, self),
            cast(Limits, SimpleNamespace(json_body=999)),
            {"mcp": Subjects(TABLE).of},
        )
        operation = TABLE.find(method, path)
        return await router.route(Call(scope, receive, send, "r1", share), operation, path)


async def test_a_create_goes_on_to_the_next_host_if_one_has_no_room() -> None:
    hosts = Hosts(h1=False, h2=True)
    assert await hosts.route("POST", "/api/v1/vms", body=b'{"name": "web"}')
    assert hosts.asked == ["h1", "h2"]


@pytest.mark.parametrize("kind", ["vms", "snapshots", "volumes"])
async def test_any_host_finds_what_another_one_has(kind: str) -> None:
    hosts = Hosts(h1=True, h2=True)
    hosts.has("h2", kind, "data")
    hosts.has("h0", kind, "own")
    assert await hosts.route("GET", f"/api/v1/{kind}/data")
    assert hosts.asked == ["h2"]
    # This host answers for its own, and says that there is no other.
    assert not await hosts.route("GET", f"/api/v1/{kind}/own")
    assert not await hosts.route("GET", f"/api/v1/{kind}/other")
    assert hosts.asked == ["h2"]


NEEDS = [
    {"volumes": ["data:/data"]},
    {"volumes": ["data:/a:ro", "more:/b", "none:/c"]},
    {"from_snapshot": "then"},
    {"from_snapshot": "then", "volumes": ["data:/data"]},
]


def tool(tool: str, **arguments: Any) -> bytes:
    """Returns the message of a model that calls a tool."""
    params = {"name": tool, "arguments": arguments}
    return msgspec.json.encode({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": params})


@pytest.mark.parametrize("needs", NEEDS, ids=["volume", "volumes", "snapshot", "both"])
async def test_a_vm_is_made_where_its_volumes_and_its_snapshot_are(needs: dict[str, Any]) -> None:
    hosts = Hosts(h1=True, h2=True)
    hosts.has("h2", "volumes", "data", "more")
    hosts.has("h2", "snapshots", "then")
    assert await hosts.route("POST", "/api/v1/vms", body=msgspec.json.encode({"name": "web", **needs}))
    assert await hosts.route("POST", "/api/v1/mcp", body=tool("vms_create", name="web", **needs))
    assert hosts.asked == ["h2", "h2"]
    # Placement would choose another host.
    assert await hosts.route("POST", "/api/v1/vms", body=b'{"name": "web"}')
    assert hosts.asked == ["h2", "h2", "h1"]


async def test_a_vm_whose_volumes_are_on_two_hosts_is_refused() -> None:
    hosts = Hosts(h1=True, h2=True)
    hosts.has("h1", "volumes", "other")
    hosts.has("h2", "volumes", "data")
    with pytest.raises(Problem, match="volumes data on h2, volumes other on h1") as refused:
        await hosts.route("POST", "/api/v1/vms", body=b'{"name": "no", "volumes": ["data:/a:ro", "other:/b"]}')
    assert (refused.value.status, refused.value.code) == (409, "on-several-hosts")
    assert hosts.asked == []


async def test_a_model_reaches_a_vm_from_any_host() -> None:
    hosts = Hosts(h1=True, h2=True)
    hosts.has("h2", "vms", "web")
    hosts.has("h0", "vms", "own")
    assert await hosts.route("POST", "/api/v1/mcp", body=tool("vms_exec", vm="web", command=["true"]))
    read = {"jsonrpc": "2.0", "id": 1, "method": "resources/read", "params": {"uri": "volant://vms/web"}}
    assert await hosts.route("POST", "/api/v1/mcp", body=msgspec.json.encode(read))
    command = {"command": "volant.vms.get", "params": {"name": "web"}}
    assert await hosts.route("POST", "/api/v1/mcp", body=msgspec.json.encode(command))
    # The name is taken: the host that has it says so.
    assert await hosts.route("POST", "/api/v1/mcp", body=tool("vms_create", name="web"))
    assert hosts.asked == ["h2"] * 4
    assert not await hosts.route("POST", "/api/v1/mcp", body=tool("vms_exec", vm="own", command=["true"]))
    assert hosts.asked == ["h2"] * 4


async def test_no_client_can_say_who_it_is() -> None:
    hosts = Hosts(h1=True)
    forged = (CALLER, b64encode(msgspec.json.encode(ADMIN)))
    assert await hosts.route("GET", "/api/v1/vms", (b"volant-host", b"h1"), forged)
    assert forwarded_in(hosts.headers).caller.id == VIEWER.id
    # Nor does a host choose between two.
    with pytest.raises(Problem) as refused:
        forwarded_in([forged, *hosts.headers])
    assert refused.value.code == "no-caller"


@pytest.mark.parametrize("address", ["", "h1", "h1:", "h1:x", "h1:99999", "h1:-1", "h\0:1", f"{'a' * 300}:1", "é..:1"])
async def test_a_host_with_a_malformed_address_is_unreachable(address: str) -> None:
    peers = Peers(ssl.create_default_context(), lambda name: address)
    with pytest.raises(Problem) as refused:
        await peers.ask("h1", "/", [], timeout_s=5)
    assert refused.value.code == "host-unreachable"
    with pytest.raises(ExceptionGroup) as unreachable:
        async with peers.connect("h1") as client, client.stream("GET", "/", timeout_s=5):
            pass
    assert unreachable.group_contains(AgentUnreachable)


async def test_what_is_kept_of_answers_is_bounded_in_sum(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(authority.issue("localhost", server=True))
    size = 1_000_000

    async def serve(stream: trio.SSLStream[trio.SocketStream]) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await stream.receive_some()
            await stream.send_all(head + bytes(size))
            await stream.receive_some()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_ssl_over_tcp, serve, 0, served, host="127.0.0.1"))
        port = listeners[0].transport_listener.socket.getsockname()[1]
        peers = Peers(authority.client_context(), lambda name: f"localhost:{port}", max_kept=5 * size // 2)
        for _ in range(3):
            # Alone, each is small enough.
            assert len((await peers.ask("h1", "/", [], timeout_s=20)).body) == size
        with peers.keeping() as keep:
            for _ in range(2):
                await peers.ask("h1", "/", [], timeout_s=20, keep=keep)
            with pytest.raises(Problem, match="together already"):
                await peers.ask("h1", "/", [], timeout_s=20, keep=keep)
        await peers.ask("h1", "/", [], timeout_s=20)
        nursery.cancel_scope.cancel()
