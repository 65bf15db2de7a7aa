"""Browsers sign in with a key that their page does not keep, and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trio.testing

from tests.api.kit import api, streamed
from tests.api.test_keys import desk
from volant.http import ApiSettings, parse_network
from volant.http._sessions import MAX_SESSIONS_OF_ONE, SESSION_S, Sessions
from volant.model import Caller, Problem, Role

KEY = "a-key-of-the-settings-0123456789"


class Browser:
    """Keeps cookies as a browser does, and sends what a page of ours would."""

    def __init__(self, client: httpx.AsyncClient, origin: str) -> None:
        self.client = client
        self.origin = origin
        self.cookie = ""
        self.proof = ""

    async def sign_in(self, key: str) -> dict[str, Any]:
        answer = await self.client.post("/api/v1/session", json={"key": key}, headers={"Origin": self.origin})
        assert answer.status_code == 201, answer.text
        self.set_cookie = answer.headers["set-cookie"]
        self.cookie = self.set_cookie.partition(";")[0]
        self.proof = answer.json()["proof"]
        return dict(answer.json())

    def headers(self, **more: str | None) -> dict[str, str]:
        sent = {"Cookie": self.cookie, "Volant-Session": self.proof, "Origin": self.origin, **more}
        return {name: value for name, value in sent.items() if value is not None}

    async def status(self, method: str = "GET", path: str = "/api/v1/vms", **more: str | None) -> int:
        answer = await self.client.request(method, path, headers=self.headers(**more))
        return answer.status_code


def browser_of(client: httpx.AsyncClient) -> Browser:
    client.cookies.jar.clear()
    return Browser(client, str(client.base_url).rstrip("/"))


async def test_a_session_stands_for_the_key_that_began_it(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.create("root")
        viewer = await at.create("watcher", role="viewer")
        browser = browser_of(at.served.client)
        said = await browser.sign_in(viewer)
        assert (said["caller"], said["role"], said["signed_in"]) == ("key:watcher", "viewer", True)
        assert said["permissions"] == ["public", "view"]
        assert viewer not in str(said)
        found = await at.served.client.get("/api/v1/session", headers=browser.headers())
        assert found.json()["caller"] == "key:watcher"
        assert await browser.status() == 200
        assert await browser.status("POST", "/api/v1/vms/none/start") == 403
        assert await browser.status("DELETE", "/api/v1/session") == 204
        assert await browser.status() == 401


async def test_the_cookie_is_hidden_and_neither_half_opens_anything_alone(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=(KEY,))) as served:
        browser = browser_of(served.client)
        await browser.sign_in(KEY)
        assert browser.set_cookie.startswith("volant-session=")
        assert {"Path=/", "HttpOnly", "SameSite=Strict"} <= set(browser.set_cookie.split("; "))
        assert "Domain" not in browser.set_cookie
        served.client.cookies.jar.clear()
        assert await browser.status() == 200
        for half in ({"Cookie": None}, {"Volant-Session": None}, {"Volant-Session": "x" * 43}):
            assert await browser.status(**half) == 401, half
        assert await browser.status(Cookie="volant-session=x") == 401
        other = browser_of(served.client)
        await other.sign_in(KEY)
        served.client.cookies.jar.clear()
        assert await browser.status(Cookie=other.cookie) == 401


async def test_the_cookie_is_bound_to_tls_where_a_proxy_does_tls(tmp_path: Path) -> None:
    settings = ApiSettings(api_keys=(KEY,), trusted_proxies=(parse_network("127.0.0.1"),))
    async with api(tmp_path, settings) as served:
        headers = {"X-Forwarded-Proto": "https", "Origin": f"https://127.0.0.1:{served.server.port}"}
        answer = await served.client.post("/api/v1/session", json={"key": KEY}, headers=headers)
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("__Host-volant-session=")
        assert "Secure" in cookie.split("; ")
        served.client.cookies.jar.clear()
        value = cookie.partition(";")[0].partition("=")[2]
        for name, status in (("__Host-volant-session", 200), ("volant-session", 401)):
            sent = {**headers, "Cookie": f"{name}={value}", "Volant-Session": answer.json()["proof"]}
            assert (await served.client.get("/api/v1/vms", headers=sent)).status_code == status, name


async def test_a_page_of_another_origin_can_not_use_a_session(tmp_path: Path) -> None:
    settings = ApiSettings(api_keys=(KEY,), cors_origins=("https://console.example",))
    async with api(tmp_path, settings) as served:
        browser = browser_of(served.client)
        await browser.sign_in(KEY)
        path = "/api/v1/system/drain"
        for origin in ("https://attacker.example", "http://127.0.0.1:1", "https://console.example", "null", None):
            assert await browser.status("POST", path, Origin=origin) == 403, origin
        assert await browser.status("POST", path, **{"Sec-Fetch-Site": "same-site"}) == 403
        assert await browser.status("POST", path) == 200
        assert await browser.status("POST", path.replace("drain", "undrain")) == 200


async def test_signing_out_ends_open_streams_and_tickets(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=(KEY,))) as served:
        browser = browser_of(served.client)
        await browser.sign_in(KEY)
        tickets = []
        for _ in range(2):
            answer = await served.client.post("/api/v1/tickets", json={}, headers=browser.headers())
            assert answer.status_code == 201, answer.text
            tickets.append(answer.json()["ticket"])
        async with streamed(served.server, f"/api/v1/events/vms?ticket={tickets[0]}") as events:
            assert events.status == 200
            assert await events.more()
            assert await browser.status("DELETE", "/api/v1/session") == 204
            while await events.more():
                pass
        late = await served.server.get(f"/api/v1/events/vms?ticket={tickets[1]}")
        assert late.status == 401


async def test_a_session_ends_with_its_key(tmp_path: Path) -> None:
    async with desk(tmp_path) as at:
        await at.create("root")
        key = await at.create("ci", role="operator")
        browser = browser_of(at.served.client)
        await browser.sign_in(key)
        ticket = (await at.served.client.post("/api/v1/tickets", json={}, headers=browser.headers())).json()["ticket"]
        async with streamed(at.served.server, f"/api/v1/events/vms?ticket={ticket}") as events:
            assert await events.more()
            await at.delete("ci")
            while await events.more():
                pass
        answer = await at.served.client.get("/api/v1/vms", headers=browser.headers())
        assert (answer.status_code, answer.json()["type"]) == (401, "urn:volant:error:session-ended")


async def test_wrong_keys_begin_no_session(tmp_path: Path) -> None:
    async with api(tmp_path, ApiSettings(api_keys=(KEY,))) as served:
        answer = await served.client.post("/api/v1/session", json={"key": "wrong"})
        assert (answer.status_code, answer.json()["type"]) == (401, "urn:volant:error:unauthenticated")
        assert "set-cookie" not in answer.headers


async def test_without_keys_nobody_has_to_sign_in(tmp_path: Path) -> None:
    async with api(tmp_path) as served:
        found = (await served.client.get("/api/v1/session")).json()
        assert (found["caller"], found["role"], found["signed_in"]) == ("anonymous", "admin", False)
        answer = await served.client.post("/api/v1/session", json={"key": KEY})
        assert (answer.status_code, answer.json()["type"]) == (409, "urn:volant:error:no-key-needed")
        assert (await served.client.delete("/api/v1/session")).status_code == 204


async def test_sessions_are_bounded_and_expire(autojump_clock: trio.testing.MockClock) -> None:
    ended: list[float] = []
    sessions = Sessions(lambda: ended.append(trio.current_time()), limit=MAX_SESSIONS_OF_ONE + 1)
    one, other = (Caller(name, name, Role.VIEWER) for name in ("one", "other"))
    begun = [sessions.open(one) for _ in range(MAX_SESSIONS_OF_ONE)]
    assert ended == []
    begun.append(sessions.open(one))
    assert len(ended) == 1, "the streams of the oldest go on"
    assert sessions.find(begun[0].cookie.encode(), begun[0].proof.encode()) is None
    last = begun[-1]
    assert sessions.find(last.cookie.encode(), last.proof.encode()) == last.caller
    sessions.open(other)
    with pytest.raises(Problem, match="sessions"):
        sessions.open(Caller("third", "third"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sessions.keep)
        await trio.sleep(SESSION_S + 1)
        nursery.cancel_scope.cancel()
    assert len(ended) >= 2
    assert sessions.find(last.cookie.encode(), last.proof.encode()) is None
    assert sessions.ended(last.caller.credential, lambda caller: None) is not None
