"""Servers in guests at origins of their own: apart from the API, opened by a grant, and otherwise as they are."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.api.kit import UPGRADE, Answer, Api, read_head, request, web_vm
from tests.api.test_sessions import browser_of
from volant.http import ApiSettings
from volant.http._addresses import domains_of, parse_port_origin
from volant.http._sessions import MAX_SESSIONS_OF_ONE
from volant.model import Caller

KEY = "a-key-of-the-settings-0123456789"
LOCKED = ApiSettings(api_keys=(KEY,))
SOMEBODY = Caller("somebody", "somebody")


@dataclass
class Web:
    """A VM `demo` with a server."""

    api: Api
    seen: list[Any] = field(default_factory=list)
    answer: list[tuple[bytes, bytes]] = field(default_factory=list)
    """The headers of its answers."""
    status: int = 200
    port: int = 0
    vm_id: int = 0

    @property
    def host(self) -> str:
        return f"{self.port}-{self.vm_id}.localhost:{self.api.server.port}"

    @property
    def headers(self) -> dict[bytes, bytes]:
        """Those of the newest request that it got."""
        return dict(self.seen[-1]["headers"])

    async def get(self, path: str = "/", method: str = "GET", /, **headers: str) -> Answer:
        sent = {"Host": self.host, **headers}
        return await self.api.server.ask(request(method, path, None if method == "GET" else b"", **sent))

    async def open(self, path: str = "/", **headers: str) -> str:
        """Returns the link that opens the port."""
        answer = await self.api.client.post(
            "/api/v1/vms/demo/origins", json={"port": self.port, "path": path}, headers=headers
        )
        assert answer.status_code == 200, answer.text
        assert answer.json()["origin"] == f"http://{self.host}"
        return str(answer.json()["url"])

    async def grant(self, **headers: str) -> str:
        """Follows that link; returns the cookie of the grant."""
        parts = urlsplit(await self.open("/app?x=1", **headers))
        assert parts.netloc == self.host
        answer = await self.get(f"{parts.path}?{parts.query}")
        assert (answer.status, answer.headers["location"]) == (303, "/app?x=1")
        cookie = answer.headers["set-cookie"]
        assert {"HttpOnly", "SameSite=Lax", "Path=/"} <= set(cookie.split("; "))
        assert "Domain" not in cookie
        return cookie.partition(";")[0]


@pytest.fixture
async def web(tmp_path: Path) -> AsyncIterator[Web]:
    found: list[Web] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        (at,) = found
        at.seen.append(scope)
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close"})
            return
        headers = [(b"content-length", b"2"), (b"content-type", b"text/html"), *at.answer]
        await send({"type": "http.response.start", "status": at.status, "headers": headers})
        await send({"type": "http.response.body", "body": b"hi"})

    async with web_vm(tmp_path, app) as served:
        row = served.deps.store.projection.rows()[0]
        assert row.manifest.workload is not None
        port = row.manifest.workload.port
        assert port is not None
        found.append(Web(served, port=port, vm_id=row.id))
        yield found[0]


async def test_a_page_runs_as_it_is_and_sees_itself_on_its_loopback(web: Web) -> None:
    web.answer = [
        (b"set-cookie", b"a=b; Domain=localhost; Path=/"),
        (b"service-worker-allowed", b"/"),
        (b"strict-transport-security", b"max-age=1"),
    ]
    origin = f"http://{web.host}"
    answer = await web.get(
        "/x?api_key=mine&ticket=too", Origin=origin, Referer=f"{origin}/y", Cookie="a=b; volant-port=z", X_Mine="1",
        Authorization="Basic abc", X_Volant_API_Key="secret", Volant_Project="none", Sec_Fetch_Site="same-origin",
    )  # fmt: skip
    assert (answer.status, answer.body) == (200, b"hi")
    assert "content-security-policy" not in answer.headers
    assert answer.headers["set-cookie"] == "a=b; Path=/"
    assert answer.headers["service-worker-allowed"] == "/"
    assert "strict-transport-security" not in answer.headers
    scope = web.seen[-1]
    assert (scope["path"], scope["query_string"]) == ("/x", b"api_key=mine&ticket=too")
    inside = f"http://localhost:{web.port}".encode()
    assert web.headers[b"host"] == f"localhost:{web.port}".encode()
    assert (web.headers[b"origin"], web.headers[b"referer"]) == (inside, inside + b"/y")
    assert (web.headers[b"cookie"], web.headers[b"authorization"]) == (b"a=b", b"Basic abc")
    assert web.headers[b"x-forwarded-host"] == web.host.encode()
    assert not {b"x-volant-api-key", b"volant-project"} & web.headers.keys()
    web.answer, web.status = [(b"location", inside + b"/next")], 302
    assert (await web.get("/")).headers["location"] == f"{origin}/next"
    async with await web.api.server.connect() as stream:
        await stream.send_all(request("GET", "/", Host=web.host, Origin=origin, **UPGRADE))
        assert b" 101 " in (await read_head(stream))[0]


async def test_nothing_of_the_api_is_at_the_origin_of_a_port(web: Web) -> None:
    for path in ("/api/v1/vms", "/healthz", "/docs", "/", "/console/x", "/ws/v1/agui", "/api/v1/session"):
        before = len(web.seen)
        assert (await web.get(path)).body == b"hi"
        assert len(web.seen) == before + 1, path
    assert (await web.get("/api/v1/vms/demo", "DELETE")).body == b"hi"
    assert (await web.api.client.get("/api/v1/vms/demo")).status_code == 200
    assert (await web.get("/.volant/other")).status == 404


async def test_other_pages_get_nothing_but_a_link(web: Web) -> None:
    origin = f"http://127.0.0.1:{web.api.server.port}"
    for headers in (
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"},
        {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"},
        {"Origin": origin, **UPGRADE},
    ):
        assert (await web.get("/", **headers)).status == 403, headers
    for foreign in (origin, "https://attacker.example", "null"):
        assert (await web.get("/", "POST", Origin=foreign)).status == 403
    assert web.seen == []
    link = {"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    assert (await web.get("/", **link)).status == 200


async def test_where_keys_are_in_force_only_a_grant_opens_a_port(web: Web) -> None:
    web.api.access.replace(LOCKED)
    assert (await web.get("/")).status == 401
    assert (await web.get("/", X_Volant_API_Key=KEY)).status == 401
    page = await web.get("/", Sec_Fetch_Dest="document")
    assert (page.status, b"web console" in page.body) == (401, True)
    assert web.seen == []
    cookie = await web.grant(**{"X-Volant-API-Key": KEY})
    assert (await web.get("/", Cookie=cookie)).status == 200
    assert b"cookie" not in web.headers
    other = Web(web.api, web.seen, port=web.port + 1, vm_id=web.vm_id)
    for elsewhere in (other, Web(web.api, web.seen, port=web.port, vm_id=web.vm_id + 1)):
        assert (await elsewhere.get("/", Cookie=cookie)).status == 401
    answer = await web.api.client.get("/api/v1/vms", headers={"Cookie": cookie.replace("port", "session")})
    assert answer.status_code == 401


async def test_a_link_opens_once_and_leads_nowhere_else(web: Web) -> None:
    web.api.access.replace(LOCKED)
    key = {"X-Volant-API-Key": KEY}
    parts = urlsplit(await web.open(**key))
    first = await web.get(f"{parts.path}?{parts.query}")
    again = await web.get(f"{parts.path}?{parts.query}")
    assert (first.status, again.status) == (303, 401)
    for to in ("//attacker.example", "https://attacker.example", "/\\attacker.example", "/%09/attacker.example"):
        ticket = web.api.access.port_ticket(SOMEBODY, web.vm_id, web.port)
        answer = await web.get(f"/.volant/open?ticket={ticket}&to={to}")
        assert (answer.status, answer.headers["location"]) == (303, "/"), to
    ticket = web.api.access.port_ticket(SOMEBODY, web.vm_id, web.port)
    answer = await web.api.server.get(f"/api/v1/events/vms?ticket={ticket}")
    assert answer.status == 401


async def test_a_grant_ends_with_the_session_that_made_it(web: Web) -> None:
    web.api.access.replace(LOCKED)
    browser = browser_of(web.api.client)
    await browser.sign_in(KEY)
    web.api.client.cookies.jar.clear()
    cookie = await web.grant(**browser.headers())
    assert (await web.get("/", Cookie=cookie)).status == 200
    for _ in range(MAX_SESSIONS_OF_ONE):
        await web.grant(**browser.headers())
    assert await browser.status() == 200, "grants have ended the session"
    cookie = await web.grant(**browser.headers())
    assert await browser.status("DELETE", "/api/v1/session") == 204
    assert (await web.get("/", Cookie=cookie)).status == 401


async def test_a_name_leads_to_the_id(web: Web) -> None:
    named = f"{web.port}-demo.localhost:{web.api.server.port}"
    answer = await web.get("/x?y=1", Host=named)
    assert (answer.status, answer.headers["location"]) == (307, f"http://{web.host}/x?y=1")
    assert (await web.get("/", Host=named.replace("demo", "none"))).status == 404
    web.api.access.replace(LOCKED)
    assert (await web.get("/", Host=named)).status == (await web.get("/", Host=named.replace("demo", "none"))).status
    assert web.seen == []


async def test_without_a_name_for_ports_the_answer_says_what_to_do(web: Web) -> None:
    at = ApiSettings(allowed_hosts=("volant.example.com",))
    web.api.access.replace(at)
    post: dict[str, Any] = {"headers": {"Host": "volant.example.com"}, "json": {"port": web.port}}
    answer = await web.api.client.post("/api/v1/vms/demo/origins", **post)
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:volant:error:no-port-domain")
    web.api.access.replace(ApiSettings(allowed_hosts=("volant.example.com", "*.volant.example.com")))
    answer = await web.api.client.post("/api/v1/vms/demo/origins", **post)
    host = f"{web.port}-{web.vm_id}.volant.example.com"
    assert answer.json() == {"origin": f"http://{host}", "url": f"http://{host}/"}
    assert (await web.get("/", Host=host)).status == 200
    assert (await web.get("/", Host="x.volant.example.com")).status == 421


@pytest.mark.parametrize(
    ("host", "found"),
    [
        ("8080-12.localhost:7777", (8080, "12", "localhost:7777")),
        ("8080-web.localhost", (8080, "web", "localhost")),
        ("8080-12.vms.example", (8080, "12", "vms.example")),
        ("8080-12.other.example", None),
        ("8080-12.localhost.attacker.example", None),
        ("x.8080-12.localhost", None),
        ("0-12.localhost", None),
        ("65536-12.localhost", None),
        ("8080-.localhost", None),
        ("8080-12.localhost.", None),
        ("8080-12.localhost:65536", None),
        ("8080-12.localhost:x", None),
        ("8080-12.localhost:1@attacker.example", None),
        (f"8080-{'a' * 64}.localhost", None),
        ("localhost", None),
        ("8080-12", None),
    ],
)
def test_hosts_that_are_ports(host: str, found: tuple[int, str, str] | None) -> None:
    origin = parse_port_origin(host, domains_of(["*.vms.example", "other.example"]))
    assert (None if origin is None else (origin.port, origin.vm, origin.domain)) == found
