"""`volar vms devtools` says where other programs find the browser in a VM."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.client.kit import answer, serving
from volant.client import Client, ClientError

from .kit import volar

PREFIX = "/ws/v1/vms/demo/devtools"
PAGE = {
    "id": "A1",
    "type": "page",
    "title": "Inbox\x1b[2J",
    "url": "http://localhost/",
    "webSocketDebuggerUrl": "ws://x",
}


async def test_people_and_programs_get_addresses_that_they_can_use() -> None:
    async with serving() as server:
        server.routes[f"GET {PREFIX}/json/version"] = answer({"Browser": "Chrome/1", "V8-Version": "1"})
        server.routes[f"GET {PREFIX}/json/list"] = answer([PAGE])
        shown = await volar(server, "vms", "devtools", "demo")
        told = await volar(server, "vms", "devtools", "demo", "--json")
    endpoint = f"{server.base_url}{PREFIX}"
    websocket = endpoint.replace("http", "ws", 1) + "/browser"
    assert shown.out.decode().splitlines() == [
        "browser:   Chrome/1",
        f"endpoint:  {endpoint}",
        f"websocket: {websocket}",
        "",
        "ID  TYPE  URL                TITLE",
        "A1  page  http://localhost/  Inbox\\x1b[2J",
    ]
    assert json.loads(told.out) == {
        "name": "Chrome/1",
        "endpoint": endpoint,
        "websocket": websocket,
        "pages": [{key: PAGE[key] for key in ("id", "type", "title", "url")}],
    }


@pytest.mark.parametrize("addresses", [["unix:/x", "http://127.0.0.1:7777"], ["unix:/x"]])
async def test_a_daemon_on_a_unix_socket_may_have_another_address(tmp_path: Path, addresses: list[str]) -> None:
    path = str(tmp_path / "s")
    async with serving(path) as server, Client(f"unix:{path}") as client:
        server.routes[f"GET {PREFIX}/json/version"] = answer({"Browser": "Chrome/1"})
        server.routes[f"GET {PREFIX}/json/list"] = answer([])
        server.routes["GET /api/v1/system/info"] = answer({"addresses": addresses})
        if len(addresses) == 1:
            with pytest.raises(ClientError, match="only on a Unix socket"):
                await client.vms.browser("demo")
            return
        assert (await client.vms.browser("demo")).endpoint == f"http://127.0.0.1:7777{PREFIX}"
