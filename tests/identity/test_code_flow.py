"""Browsers sign in at an issuer by authorization code with PKCE: what is asked, and which answers are a caller."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs, urlsplit

import msgspec
import pytest
import trio

from tests.api.kit import bare, running
from tests.identity.kit import CLIENT, ISSUER, Issuer, ec
from volant.daemon._protection import Secret
from volant.identity import IssuerTokens, _fetch as fetching
from volant.identity._fetch import post_form
from volant.identity._issuer import MAX_BYTES, IssuerError
from volant.model import Problem, Role

BACK = "http://127.0.0.1:7777/api/v1/session/oidc/callback"
ADDRESS = "192.0.2.1"


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


async def refused(tokens: IssuerTokens, issuer: Issuer, answer: dict[str, str] | None = None, **claims: Any) -> Problem:
    """Returns why a person with these claims, or with this answer of the issuer, is not signed in."""
    flow = await tokens.begin(BACK)
    given = issuer.authorize(flow.url, **claims) | (answer or {})
    with pytest.raises(Problem) as caught:
        await flow.finish({name: value for name, value in given.items() if value}, ADDRESS)
    return caught.value


async def test_a_person_becomes_the_caller_of_its_claims_and_the_token_is_used_up(
    issuer: Issuer, autojump_clock: Any
) -> None:
    async with issuer.tokens() as tokens:
        flow = await tokens.begin(BACK)
        asked = parse_qs(urlsplit(flow.url).query)
        assert (asked["tenant"], asked["response_type"], asked["client_id"]) == (["1"], ["code"], [CLIENT])
        assert (asked["redirect_uri"], asked["scope"]) == ([BACK], ["openid profile"])
        assert (asked["code_challenge_method"], len(asked["code_challenge"][0])) == (["S256"], 43)
        answer = issuer.authorize(flow.url)
        _, token = issuer.codes[answer["code"]]
        caller = await flow.finish(answer, ADDRESS)
        assert (caller.name, caller.role, caller.project) == ("oidc:ann", Role.OPERATOR, "web")
        assert (caller.address, caller.limited) == (ADDRESS, True)
        assert issuer.posted[0][1] is None
        assert (issuer.posted[0][0]["client_id"], issuer.posted[0][0]["code"]) == (CLIENT, "code-0")
        assert tokens.ended(caller.credential) is None
        # It is of the client of browsers, so nobody is a caller by it.
        with pytest.raises(Problem, match="invalid_claim"):
            tokens.caller(token, ADDRESS)
        issuer.later(661)
        assert tokens.ended(caller.credential) is not None


async def test_streams_end_when_the_token_of_a_sign_in_expires(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        flow = await tokens.begin(BACK)
        # It has 15 s, as clocks may differ by a minute.
        await flow.finish(issuer.authorize(flow.url, exp=issuer.claims()["iat"] - 45), ADDRESS)
        await trio.sleep(1)
        before = issuer.rechecks
        issuer.later(16)
        await trio.sleep(15)
        assert issuer.rechecks > before, "streams go on for up to a minute"


@pytest.mark.parametrize(
    ("claims", "status", "code"),
    [
        ({"aud": "volar"}, 401, "invalid-token"),
        ({"azp": "another"}, 401, "invalid-token"),
        ({"nonce": "of another sign-in"}, 401, "invalid-token"),
        ({"nonce": None}, 401, "invalid-token"),
        ({"iss": "https://other.example"}, 401, "invalid-token"),
        ({"exp": 1767225600 - 61}, 401, "token-expired"),
        ({"header": {"kid": "unknown"}}, 401, "invalid-token"),
        ({"groups": None}, 403, "no-role"),
    ],
)
async def test_a_token_that_is_not_for_this_sign_in_is_refused(
    issuer: Issuer, autojump_clock: Any, claims: dict[str, Any], status: int, code: str
) -> None:
    async with issuer.tokens() as tokens:
        problem = await refused(tokens, issuer, **claims)
        assert (problem.status, problem.code) == (status, code)
        assert "volar login" not in str(problem.hint)


async def test_a_token_with_a_wrong_signature_is_refused(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        issuer.key = ec("one")
        assert (await refused(tokens, issuer)).code == "invalid-token"


@pytest.mark.parametrize(
    ("answer", "status", "code", "words"),
    [
        ({"iss": "https://other.example"}, 401, "sign-in-failed", "not of the issuer"),
        ({"code": ""}, 401, "sign-in-failed", "no code"),
        ({"code": "code-of-another-browser"}, 401, "sign-in-failed", "invalid_grant: <b>?"),
        ({"error": "access_denied", "error_description": "no\x1b[2J"}, 403, "sign-in-denied", "access_denied: no?[2J"),
        ({"error": "x" * 1000}, 401, "sign-in-failed", "x" * 300),
    ],
)
async def test_an_answer_that_is_no_sign_in_says_why(
    issuer: Issuer, autojump_clock: Any, answer: dict[str, str], status: int, code: str, words: str
) -> None:
    async with issuer.tokens() as tokens:
        problem = await refused(tokens, issuer, answer)
        assert (problem.status, problem.code) == (status, code)
        assert words in problem.detail
        assert len(problem.detail) < 400


async def test_a_code_of_another_sign_in_is_refused(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        other = issuer.authorize((await tokens.begin(BACK)).url, groups=["ops"])
        assert "invalid_grant" in (await refused(tokens, issuer, {"code": other["code"]})).detail


async def test_an_issuer_that_names_itself_always_does(issuer: Issuer, autojump_clock: Any) -> None:
    issuer.discovery["authorization_response_iss_parameter_supported"] = True
    async with issuer.tokens() as tokens:
        assert "not of the issuer" in (await refused(tokens, issuer)).detail
        flow = await tokens.begin(BACK)
        assert await flow.finish(issuer.authorize(flow.url) | {"iss": ISSUER}, ADDRESS)


async def test_a_secret_goes_as_the_issuer_takes_it(issuer: Issuer, autojump_clock: Any) -> None:
    settings = msgspec.structs.replace(issuer.settings(), client_secret=Secret("s p:c"))
    assert "s p:c" not in repr(settings)
    for methods, login in ((None, (CLIENT, "s+p%3Ac")), (["client_secret_post"], None)):
        issuer.discovery["token_endpoint_auth_methods_supported"] = methods
        async with issuer.tokens() as tokens:
            tokens.replace(settings)
            flow = await tokens.begin(BACK)
            await flow.finish(issuer.authorize(flow.url), ADDRESS)
        form, given = issuer.posted.pop()
        assert given == login
        assert form.get("client_secret") == (None if login else "s p:c")


async def test_other_settings_end_sign_ins_and_an_issuer_without_the_endpoints_begins_none(
    issuer: Issuer, autojump_clock: Any
) -> None:
    async with issuer.tokens() as tokens:
        flow = await tokens.begin(BACK)
        tokens.replace(issuer.settings("groups=web:viewer:web"))
        with pytest.raises(Problem, match="have changed"):
            await flow.finish(issuer.authorize(flow.url), ADDRESS)
        again = await tokens.begin(BACK)
        caller = await again.finish(issuer.authorize(again.url), ADDRESS)
        assert tokens.ended(caller.credential) is None
        tokens.replace(msgspec.structs.replace(issuer.settings("groups=web:viewer:web"), client_id="another"))
        assert "was changed" in str(tokens.ended(caller.credential))
        tokens.replace(msgspec.structs.replace(issuer.settings(), browsers=False))
        assert not tokens.signs_in_browsers
        with pytest.raises(Problem) as caught:
            await tokens.begin(BACK)
        assert (caught.value.status, caught.value.code) == (409, "no-browser-sign-in")
    for name, value in (("authorization_endpoint", None), ("token_endpoint", "http://issuer.example/token")):
        issuer.discovery[name] = value
        async with issuer.tokens() as tokens:
            with pytest.raises(Problem) as caught:
                await tokens.begin(BACK)
            assert (caught.value.status, caught.value.code) == (409, "no-browser-sign-in")


async def test_an_issuer_that_is_down_or_slow_is_an_error_and_is_asked_again(
    issuer: Issuer, autojump_clock: Any
) -> None:
    issuer.is_down = True
    async with issuer.tokens() as tokens:
        with pytest.raises(Problem) as caught:
            await tokens.begin(BACK)
        assert (caught.value.status, caught.value.code) == (503, "issuer-unreachable")
        issuer.is_down = False
        await trio.sleep(11)
        flow = await tokens.begin(BACK)
        answer = issuer.authorize(flow.url)
        issuer.is_down = True
        with pytest.raises(Problem) as caught:
            await flow.finish(answer, ADDRESS)
        assert (caught.value.status, caught.value.code) == (503, "issuer-unreachable")


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "FETCH_S", 0.5)


@asynccontextmanager
async def answering(status: int, headers: list[tuple[bytes, bytes]], pieces: int) -> AsyncIterator[str]:
    """A server that answers so, with that many pieces of 64 KiB; less than none: never."""

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        if pieces < 0:
            await trio.sleep_forever()
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for _ in range(pieces):
            await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async with running(bare(serve)) as server:
        yield f"http://127.0.0.1:{server.port}/token"


async def test_a_form_is_posted_within_limits(short: None) -> None:
    async with answering(200, [], 160) as url:
        with pytest.raises(IssuerError, match=f"more than {MAX_BYTES} bytes"):
            await post_form(url, {"code": "c"}, None)
    async with answering(200, [], -1) as url:
        with pytest.raises(IssuerError, match="does not answer within"):
            await post_form(url, {"code": "c"}, None)
    async with answering(200, [], 0) as other:
        async with answering(307, [(b"location", other.encode())], 0) as url:
            assert (await post_form(url, {"code": "c"}, ("u", "p"))).status == 307
