"""Browsers sign in at the daemon's issuer: from the click to the session, and what others can do meanwhile."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
import pytest
import trio
import trio.testing

from tests.api.kit import Api, api
from tests.identity.kit import Issuer
from volant.http import Access, ApiSettings, parse_network
from volant.http._sign_ins import (
    ATTEMPT_S,
    FINISH_S,
    MAX_ATTEMPTS,
    MAX_ATTEMPTS_OF_ONE,
    MAX_EXCHANGES,
    SignIns,
)
from volant.model import Caller, Problem, Role

BEGIN = "/api/v1/session/oidc"
CALLBACK = f"{BEGIN}/callback"
FINISH = f"{BEGIN}/finish"
LEADS_HERE = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}


class Page:
    """A page of ours in a browser with cookies of its own."""

    def __init__(self, served: Api, issuer: Issuer, **headers: str) -> None:
        self.client = served.client
        self.issuer = issuer
        self.headers = {"Origin": str(served.client.base_url).rstrip("/"), **headers}
        self.cookies: dict[str, str] = {}
        self.proof = ""

    async def send(self, method: str, path: str, body: object = None, **headers: str) -> httpx.Response:
        self.client.cookies.jar.clear()
        sent = {**self.headers, **headers, "Cookie": "; ".join(f"{name}={of}" for name, of in self.cookies.items())}
        answer = await self.client.request(method, path, json=body, headers=sent)
        self.set_cookies = answer.headers.get_list("set-cookie")
        for given in self.set_cookies:
            name, _, value = given.partition(";")[0].partition("=")
            self.cookies[name] = value
        return answer

    async def begin(self) -> str:
        answer = await self.send("POST", BEGIN, {})
        assert answer.status_code == 201, answer.text
        [self.set_cookie] = self.set_cookies
        self.proof = answer.json()["proof"]
        return str(answer.json()["url"])

    async def back(self, answer: dict[str, str]) -> None:
        """Follows the issuer's redirect, which leads to the console and nowhere else."""
        found = await self.send("GET", f"{CALLBACK}?{urlencode(answer)}", **LEADS_HERE)
        assert (found.status_code, found.headers["location"]) == (303, "/#/")
        assert "set-cookie" not in found.headers

    async def finish(self) -> tuple[int, Any]:
        answer = await self.send("POST", FINISH, {"proof": self.proof})
        return answer.status_code, answer.json() if answer.is_success else answer.json()["type"].rpartition(":")[2]


@asynccontextmanager
async def signing_in(path: Path, issuer: Issuer, **settings: Any) -> AsyncIterator[Api]:
    async with issuer.tokens() as tokens:
        async with api(path, access=Access(ApiSettings(**settings), tokens=tokens)) as served:
            yield served


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


async def test_a_person_signs_in_and_the_session_ends_with_the_token(
    tmp_path: Path, issuer: Issuer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with signing_in(tmp_path, issuer) as served:
        page = Page(served, issuer)
        known = (await served.client.get("/api/v1/auth")).json()
        assert (known["required"], known["browser_sign_in"]) == (True, True)
        url = await page.begin()
        assert page.set_cookie.startswith("volant-sign-in=")
        assert {"Path=/", "HttpOnly", "SameSite=Lax", "Max-Age=300"} <= set(page.set_cookie.split("; "))
        assert "Domain" not in page.set_cookie
        assert parse_qs(urlsplit(url).query)["redirect_uri"] == [f"{page.headers['Origin']}{CALLBACK}"]
        assert await page.finish() == (409, "sign-in-unfinished")
        answer = issuer.authorize(url)
        _, token = issuer.codes[answer["code"]]
        await page.back(answer)
        status, session = await page.finish()
        assert (status, session["caller"], session["role"], session["project"]) == (201, "oidc:ann", "operator", "web")
        assert page.cookies["volant-sign-in"] == ""
        # The token is valid for ten minutes, and one by which clocks may differ.
        [cookie] = [one for one in page.set_cookies if one.startswith("volant-session=")]
        assert {"Max-Age=660", "HttpOnly", "SameSite=Strict"} <= set(cookie.split("; "))
        left = await page.send("GET", "/api/v1/session", **{"Volant-Session": session["proof"]})
        assert (left.status_code, left.json()["signed_in"]) == (200, True)
        issuer.later(661)
        ended = await page.send("GET", "/api/v1/session", **{"Volant-Session": session["proof"]})
        assert (ended.status_code, ended.json()["type"]) == (401, "urn:volant:error:session-ended")
        secret = [page.proof, session["proof"], answer["code"], answer["state"], token.decode()]
        # What this test itself sends is logged by its client.
        logged = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("volant"))
        assert CALLBACK in logged
        assert not [one for one in secret if one in logged]


async def test_neither_half_of_a_sign_in_opens_anything_alone(tmp_path: Path, issuer: Issuer) -> None:
    async with signing_in(tmp_path, issuer) as served:
        page = Page(served, issuer)
        answer = issuer.authorize(await page.begin())
        await page.back(answer)
        other, thief = Page(served, issuer), Page(served, issuer)
        # A server on another port of the host gets the cookie, and a script that got into the page the proof.
        thief.cookies = dict(page.cookies)
        other.proof = page.proof
        for half in (thief, other):
            half.proof = half.proof or "x" * 43
            assert await half.finish() == (401, "sign-in-ended")
        assert (await page.finish())[0] == 201
        thief.proof = page.proof
        assert await thief.finish() == (401, "sign-in-ended")


async def test_an_answer_counts_once_and_in_its_own_browser_alone(tmp_path: Path, issuer: Issuer) -> None:
    async with signing_in(tmp_path, issuer) as served:
        victim, attacker = Page(served, issuer), Page(served, issuer)
        foreign = issuer.authorize(await attacker.begin(), groups=["ops"])
        # A link that leads a browser without an attempt, and one with its own, to the end of somebody else's.
        await victim.back(foreign)
        url = await victim.begin()
        await victim.back(foreign)
        await victim.back({**foreign, "state": ""})
        assert await victim.finish() == (409, "sign-in-unfinished")
        answer = issuer.authorize(url)
        await victim.back({**answer, "code": foreign["code"]})
        assert await victim.finish() == (401, "sign-in-failed")
        # A code of its own comes too late now.
        await victim.back(answer)
        assert await victim.finish() == (401, "sign-in-ended")
        posted = len(issuer.posted)
        url = await victim.begin()
        answer = issuer.authorize(url)
        await victim.back(answer)
        await victim.back(answer)
        assert len(issuer.posted) == posted + 1, "a code was exchanged twice"
        assert (await victim.finish())[0] == 201


async def test_an_error_is_shown_to_the_page_that_began_and_to_no_other(tmp_path: Path, issuer: Issuer) -> None:
    async with signing_in(tmp_path, issuer) as served:
        page = Page(served, issuer)
        for answer, claims, expected in (
            ({"error": "access_denied", "code": ""}, {}, (403, "sign-in-denied")),
            ({"iss": "https://other.example"}, {}, (401, "sign-in-failed")),
            ({}, {"groups": []}, (403, "no-role")),
            ({}, {"nonce": "another"}, (401, "invalid-token")),
        ):
            given = issuer.authorize(await page.begin(), **claims) | answer
            await page.back(given)
            assert await page.finish() == expected
        assert served.access.failures["no-role"] == 1
        issuer.is_down = True
        given = {"code": "x", "state": parse_qs(urlsplit(await page.begin()).query)["state"][0]}
        await page.back(given)
        assert await page.finish() == (503, "issuer-unreachable")


async def test_the_address_at_the_daemon_is_that_of_a_checked_host(tmp_path: Path, issuer: Issuer) -> None:
    settings = {"trusted_proxies": (parse_network("127.0.0.1"),), "allowed_hosts": ("volant.example",)}
    async with signing_in(tmp_path, issuer, **settings) as served:
        hostile = {
            "Host": "attacker.example",
            "X-Forwarded-Host": "attacker.example",
            "Origin": "http://attacker.example",
        }
        for method, path in (("POST", BEGIN), ("GET", f"{CALLBACK}?state=x"), ("POST", FINISH)):
            answer = await Page(served, issuer).send(method, path, **hostile)
            assert (answer.status_code, answer.json()["type"]) == (421, "urn:volant:error:unknown-host")
        # Another page can neither begin nor finish one, and leads nowhere but by a link that replaces it.
        for method, path in (("POST", BEGIN), ("POST", FINISH)):
            answer = await Page(served, issuer).send(method, path, {"proof": "x"}, Origin="http://attacker.example")
            assert answer.status_code == 403
        for changed in ({"Sec-Fetch-Mode": "no-cors"}, {"Sec-Fetch-Dest": "iframe"}):
            answer = await Page(served, issuer).send("GET", f"{CALLBACK}?state=x", **(LEADS_HERE | changed))
            assert answer.status_code == 403
        secure = Page(
            served, issuer,
            Host="volant.example", Origin="https://volant.example", **{"X-Forwarded-Proto": "https"},
        )  # fmt: skip
        url = await secure.begin()
        assert parse_qs(urlsplit(url).query)["redirect_uri"] == [f"https://volant.example{CALLBACK}"]
        assert secure.set_cookie.startswith("__Host-volant-sign-in=")
        assert "Secure" in secure.set_cookie.split("; ")
        await secure.back(issuer.authorize(url))
        status, _ = await secure.finish()
        assert (status, sorted(secure.cookies)) == (201, ["__Host-volant-session", "__Host-volant-sign-in"])


async def test_without_an_issuer_for_browsers_there_is_no_such_sign_in(tmp_path: Path, issuer: Issuer) -> None:
    async with api(tmp_path, ApiSettings(api_keys=("a-key-of-the-settings-0123456789",))) as served:
        assert (await served.client.get("/api/v1/auth")).json()["browser_sign_in"] is False
        answer = await served.client.post(BEGIN)
        assert (answer.status_code, answer.json()["type"]) == (409, "urn:volant:error:no-browser-sign-in")
        await Page(served, issuer).back({"code": "x", "state": "y"})


class Request:
    """A sign-in at an issuer that answers when a test lets it."""

    def __init__(self) -> None:
        self.url = "https://issuer.example/"
        self.state = "state"
        self.answers = trio.Event()

    async def finish(self, answer: Any, address: str) -> Caller:
        await self.answers.wait()
        return Caller("ann", "ann", Role.VIEWER, address=address)


async def test_sign_ins_are_bounded_and_expire(autojump_clock: trio.testing.MockClock) -> None:
    def ended(one: Any) -> str:
        with pytest.raises(Problem) as caught:
            sign_ins.finish([one.cookie.encode()], one.proof)
        return caught.value.code

    sign_ins = SignIns()
    first = sign_ins.begin(Request(), "192.0.2.1")
    many = [sign_ins.begin(Request(), "192.0.2.2") for _ in range(MAX_ATTEMPTS_OF_ONE + 1)]
    assert (ended(many[0]), ended(many[1]), ended(first)) == ("sign-in-ended", *["sign-in-unfinished"] * 2)
    for number in range(MAX_ATTEMPTS):
        last = sign_ins.begin(Request(), f"2001:db8::{number:x}")
    assert (ended(first), ended(last)) == ("sign-in-ended", "sign-in-unfinished")
    assert len(sign_ins._kept) == MAX_ATTEMPTS
    await trio.sleep(ATTEMPT_S)
    assert ended(last) == "sign-in-ended"
    sign_ins.begin(Request(), "192.0.2.1")
    assert len(sign_ins._kept) == 1


async def test_few_answers_are_checked_at_once_and_the_page_has_a_minute(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sign_ins, request = SignIns(), Request()
    begun = [sign_ins.begin(request, "192.0.2.1") for _ in range(MAX_EXCHANGES + 1)]
    async with trio.open_nursery() as nursery:
        for one in begun:
            nursery.start_soon(sign_ins.take, [b"of another port", one.cookie.encode()], {"state": "state"})
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Problem, match="are being checked"):
            sign_ins.finish([begun[-1].cookie.encode()], begun[-1].proof)
        request.answers.set()
    assert sign_ins.finish([begun[0].cookie.encode()], begun[0].proof).name == "ann"
    await trio.sleep(FINISH_S)
    with pytest.raises(Problem, match="took too long"):
        sign_ins.finish([begun[1].cookie.encode()], begun[1].proof)
    # The first answers did not stop later ones from being checked.
    again = sign_ins.begin(request, "192.0.2.1")
    await sign_ins.take([again.cookie.encode()], {"state": "state"})
    assert sign_ins.finish([again.cookie.encode()], again.proof).name == "ann"
