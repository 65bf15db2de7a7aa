"""What one host sends another with a request, and the tickets of hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fleet.cluster import needs_etcd
from tests.fleet.hosts import NO_BOOT, fleet
from volant.fleet import request_headers
from volant.http import Access, ApiSettings, for_ticket
from volant.model import Caller, Role
from volant.routing import FromHosts

KEY = "a-key-of-the-fleet"
EVENTS = "/api/v1/events/vms"


async def test_the_other_host_knows_the_caller_and_how_it_reaches_the_first() -> None:
    caller = Caller("7", "key 7", role=Role.OPERATOR, project="web", credential="c0ffee", limited=True)
    asked = {"state": {"caller": caller, "request_id": "r1", "project": "web", "names_project": False}, "headers": []}
    scopes: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)

    headers = request_headers(asked, (True, "fleet.example"))
    sent = {"type": "http", "path": "/api/v1/vms", "headers": headers, "state": {}}
    await FromHosts(app, lambda ticket, path: None, {})(sent, None, None)
    (scope,) = scopes
    access = Access(ApiSettings())
    got = access.authenticate(scope, in_query=False)
    # Its credential is checked by the host that it asked, but a ticket ends with it.
    assert (got.id, got.project, got.credential, got.limited) == ("7", "web", "", False)
    assert for_ticket(scope, got).credential == "c0ffee"
    assert access.own_address(scope) == (True, "fleet.example")
    assert b"volant-caller" not in dict(scope["headers"])


@pytest.mark.system
@needs_etcd
async def test_a_ticket_is_valid_at_any_host_once(tmp_path: Path) -> None:
    names = ("h1", "h2")
    with fleet(tmp_path, *names, flags=NO_BOOT, late=names) as found:
        await found.cluster.ready()
        for host in found.hosts:
            host.daemon.use_key(KEY)
            host.daemon.start()
        await found.up()
        urls = {host.name: host.daemon.base_url for host in found.hosts}

        async with httpx.AsyncClient(timeout=20) as http:

            async def ticket(host: str, **body: Any) -> str:
                made = await http.post(f"{urls[host]}/api/v1/tickets", json=body, headers={"X-Volant-API-Key": KEY})
                assert made.status_code == 201, made.text
                return str(made.json()["ticket"])

            async def opens(host: str, ticket: str) -> int:
                async with http.stream("GET", f"{urls[host]}{EVENTS}", params={"ticket": ticket}) as answer:
                    return answer.status_code

            for path in (None, EVENTS):
                for name in names:
                    made = await ticket("h1", **({} if path is None else {"path": path}))
                    assert [await opens(name, made) for _ in range(2)] == [200, 401]
                    assert await opens("h1", made) == 401
            assert await opens("h2", await ticket("h1", path="/ws/v1/vms/web/console")) == 401
            assert await opens("h2", "h3.unknown") == 401
            assert await opens("h2", "h1.unknown") == 401
