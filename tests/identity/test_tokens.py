"""Tokens of an issuer: which are valid, for how long, and what happens when the issuer changes or is down."""

from __future__ import annotations

import base64
import hmac
import json
from typing import Any

import pytest
import trio
import trio.testing
from joserfc.jwk import OctKey, OKPKey, RSAKey

from tests.identity.kit import AUDIENCE, Issuer, ec
from volant.http import Access, ApiSettings
from volant.identity import IssuerTokens, _tokens as module
from volant.identity._issuer import GAP_S, KEEP_S, MAX_WAITING
from volant.identity._tokens import MAX_TOKEN
from volant.model import Caller, Problem, Role, is_safe_url


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


def refused(tokens: IssuerTokens, token: bytes) -> tuple[int, str, str]:
    with pytest.raises(Problem) as caught:
        tokens.caller(token, "192.0.2.1")
    return caught.value.status, caught.value.code, caught.value.detail


async def shown(tokens: IssuerTokens, token: bytes) -> Caller:
    await tokens.prepare(token)
    return tokens.caller(token, "192.0.2.1")


async def test_a_token_is_a_caller_with_the_role_of_its_claims(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        caller = await shown(tokens, issuer.sign())
        assert (caller.name, caller.role, caller.project) == ("oidc:ann", Role.OPERATOR, "web")
        assert caller.address == "192.0.2.1"
        admin = await shown(tokens, issuer.sign(groups=["web", "ops"]))
        assert (admin.role, admin.project, admin.id) == (Role.ADMIN, None, caller.id)
        assert refused(tokens, issuer.sign(groups=[]))[:2] == (403, "no-role")


@pytest.mark.filterwarnings("ignore:EdDSA is deprecated")  # The issuer's side.
@pytest.mark.parametrize(
    "key", [ec("e"), RSAKey.generate_key(2048, {"kid": "r"}), OKPKey.generate_key("Ed25519", {"kid": "o"})]
)
async def test_keys_of_each_kind_are_taken(issuer: Issuer, autojump_clock: Any, key: Any) -> None:
    issuer.rotate(key)
    async with issuer.tokens() as tokens:
        assert (await shown(tokens, issuer.sign())).role is Role.OPERATOR
        if key.key_type == "OKP":
            assert await shown(tokens, issuer.sign(header={"alg": "EdDSA"}, sub="bob"))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"aud": "someone-else"}, "invalid-token"),
        ({"aud": None}, "invalid-token"),
        ({"iss": "https://other.example"}, "invalid-token"),
        ({"iss": None}, "invalid-token"),
        ({"exp": None}, "invalid-token"),
        ({"exp": "soon"}, "invalid-token"),
        ({"exp": 1767225600 - 61}, "token-expired"),
        ({"nbf": 1767225600 + 61}, "invalid-token"),
        ({"iat": 1767225600 + 61}, "invalid-token"),
        ({"sub": None}, "invalid-token"),
        ({"sub": ""}, "invalid-token"),
        ({"cnf": {"jkt": "x"}}, "invalid-token"),
        ({"header": {"typ": "logout+jwt"}}, "invalid-token"),
        ({"header": {"kid": "unknown"}}, "invalid-token"),
    ],
)
async def test_a_token_that_is_not_for_us_is_refused(
    issuer: Issuer, autojump_clock: Any, changes: dict[str, Any], code: str
) -> None:
    async with issuer.tokens() as tokens:
        assert refused(tokens, issuer.sign(**changes))[:2] == (401, code)


@pytest.mark.parametrize("kind", ["[]", '{"a":1}', "7"])
async def test_a_type_that_is_no_text_is_refused(issuer: Issuer, autojump_clock: Any, kind: str) -> None:
    header = base64.urlsafe_b64encode(b'{"alg":"RS256","typ":%b}' % kind.encode()).rstrip(b"=")
    async with issuer.tokens() as tokens:
        assert refused(tokens, header + b".e30.x")[:2] == (401, "invalid-token")


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": ["x", AUDIENCE]},
        {"exp": 1767225600 - 30},
        {"nbf": 1767225600 + 30, "iat": 1767225600 + 30},
        {"header": {"typ": "at+jwt", "private": "member"}},
        {"header": {"x5c": ["A" * 4000, "A" * 4000]}},
    ],
)
async def test_clocks_may_differ_and_more_may_be_said(
    issuer: Issuer, autojump_clock: Any, changes: dict[str, Any]
) -> None:
    async with issuer.tokens() as tokens:
        assert await shown(tokens, issuer.sign(**changes))


def part(value: object) -> bytes:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=")


async def test_unsigned_and_symmetric_tokens_are_refused(issuer: Issuer, autojump_clock: Any) -> None:
    rsa = RSAKey.generate_key(2048, {"kid": "one"})
    issuer.rotate(rsa)
    async with issuer.tokens() as tokens:
        claims = issuer.claims(groups=["ops"])
        for name in ("none", "None", "NONE", ""):
            unsigned = part({"alg": name, "kid": "one"}) + b"." + part(claims) + b"."
            assert refused(tokens, unsigned)[1] == "invalid-token"
        # The public key as the secret of an HMAC, in the forms in which libraries are known to have taken it.
        for secret in (rsa.as_pem(private=False), json.dumps(rsa.as_dict(private=False)).encode()):
            signed = part({"alg": "HS256", "kid": "one"}) + b"." + part(claims)
            mac = base64.urlsafe_b64encode(hmac.digest(secret, signed, "sha256")).rstrip(b"=")
            assert refused(tokens, signed + b"." + mac)[1] == "invalid-token"
        header, payload, signature = issuer.sign().split(b".")
        assert refused(tokens, header + b"." + part(claims) + b"." + signature)[1] == "invalid-token"
        foreign = part({"alg": "RS256", "jwk": ec("x").as_dict(private=False), "kid": "one"})
        assert refused(tokens, foreign + b"." + payload + b"." + signature)[1] == "invalid-token"
        critical = part({"alg": "RS256", "kid": "one", "crit": ["b64"], "b64": False})
        assert refused(tokens, critical + b"." + payload + b"." + signature)[1] == "invalid-token"
        for garbage in (
            b"eyJ..",
            b"eyJ.a.b",
            b"eyJ" + b"a" * 20000 + b"..",
            part([]) + b"..",
            header + b".." + signature,
        ):
            assert refused(tokens, garbage)[1] == "invalid-token"


async def test_a_token_is_as_long_as_we_allow_in_each_part(issuer: Issuer, autojump_clock: Any) -> None:
    """The signature of an RSA key of 8192 bits has 1366 characters."""
    async with issuer.tokens() as tokens:
        unsigned = issuer.sign().rpartition(b".")[0]
        assert "its signature is wrong" in refused(tokens, unsigned + b"." + b"A" * 1368)[2]
        assert "longer than 16384 bytes" in refused(tokens, unsigned + b"." + b"A" * MAX_TOKEN)[2]


async def test_a_token_is_verified_once_and_ends_when_it_expires(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        token = issuer.sign()
        caller = await shown(tokens, token)
        issuer.is_down = True
        assert await shown(tokens, token) == caller
        assert tokens.ended(caller.credential) is None
        issuer.later(659)
        assert await shown(tokens, token) == caller
        issuer.later(2)
        assert refused(tokens, token)[1] == "token-expired"
        assert tokens.ended(caller.credential) == "the token has expired"
        before = issuer.rechecks
        await trio.sleep(61)
        assert issuer.rechecks > before


async def test_other_rules_count_at_once(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        token = issuer.sign()
        caller = await shown(tokens, token)
        tokens.replace(issuer.settings("groups=web:viewer:web"))
        assert tokens.ended(caller.credential) == "the role of the token was changed or removed"
        assert (await shown(tokens, token)).role is Role.VIEWER
        tokens.replace(issuer.settings("groups=ops:admin"))
        assert refused(tokens, token)[1] == "no-role"
        tokens.replace(None)
        assert not tokens.accepted
        assert tokens.ended(caller.credential) is not None


async def test_a_new_key_is_fetched_when_a_token_names_it(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        old = issuer.sign()
        assert await shown(tokens, old)
        issuer.rotate(ec("two"))
        await trio.sleep(GAP_S)
        assert await shown(tokens, issuer.sign())
        assert refused(tokens, old)[1] == "invalid-token"


async def test_unknown_keys_cause_few_fetches(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        began, before = trio.current_time(), issuer.fetched
        for number in range(1000):
            await tokens.prepare(issuer.sign(header={"kid": f"none-{number}"}))
            await trio.sleep(0.1)
        assert issuer.fetched - before <= (trio.current_time() - began) / GAP_S + 1


async def test_few_requests_wait_for_a_fetch(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        access = Access(ApiSettings(), tokens=tokens)
        issuer.rotate(ec("two"))
        asked = scope(headers=[(b"authorization", b"Bearer " + issuer.sign())])
        await trio.sleep(GAP_S)
        outcomes: list[str] = []

        async def ask() -> None:
            try:
                await access.prepare(asked)
                outcomes.append(access.authenticate(asked, in_query=False).name)
            except Problem as problem:
                outcomes.append(problem.code)

        issuer.answers = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_WAITING + 10):
                nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked()
            assert outcomes == ["issuer-unreachable"] * 10
            issuer.answers.set()
        assert outcomes[10:] == ["oidc:ann"] * MAX_WAITING


async def test_nothing_is_fetched_for_what_needs_no_key(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        access = Access(ApiSettings(), tokens=tokens)
        await trio.sleep(GAP_S)
        before = issuer.fetched
        token = issuer.sign(header={"kid": "unknown"})
        for path in (b"/healthz", b"/docs", b"/api/v1/auth"):
            await access.prepare(scope(raw_path=path, headers=[(b"authorization", b"Bearer " + token)]))
        assert issuer.fetched == before


async def test_tokens_are_verified_while_the_issuer_is_down(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        issuer.is_down = True
        await trio.sleep(3600)
        issuer.later(3600)
        assert await shown(tokens, issuer.sign())
        await trio.sleep(KEEP_S + 3600)
        assert refused(tokens, issuer.sign(sub="bob"))[:2] == (503, "issuer-unreachable")
        issuer.is_down = False
        await trio.sleep(61)
        assert await shown(tokens, issuer.sign(sub="bob"))


async def test_an_issuer_that_is_down_at_the_start_is_named(issuer: Issuer, autojump_clock: Any) -> None:
    issuer.is_down = True
    async with issuer.tokens() as tokens:
        status, code, detail = refused(tokens, issuer.sign())
        assert (status, code, "connection refused" in detail) == (503, "issuer-unreachable", True)


@pytest.mark.parametrize(
    "discovery",
    [
        {"issuer": "https://other.example"},
        {"jwks_uri": "http://issuer.example/jwks"},
        {"jwks_uri": "file:///etc/passwd"},
    ],
)
async def test_a_discovery_document_of_another_is_refused(
    issuer: Issuer, autojump_clock: Any, discovery: dict[str, str]
) -> None:
    issuer.discovery |= discovery
    async with issuer.tokens() as tokens:
        assert refused(tokens, issuer.sign())[1] == "issuer-unreachable"


async def test_weak_private_and_symmetric_keys_are_left_out(issuer: Issuer, autojump_clock: Any) -> None:
    class Private:
        def as_dict(self, private: bool) -> dict[str, Any]:
            return dict(ec("leaked").as_dict(private=True))

    class Strange:
        def as_dict(self, private: bool) -> dict[str, Any]:
            return {"kty": [], "kid": "strange"}

    strange: list[Any] = [
        Strange(), issuer.key, OctKey.generate_key(256, {"kid": "secret"}), Private(),
    ]  # fmt: skip
    issuer.published = strange
    async with issuer.tokens() as tokens:
        assert await shown(tokens, issuer.sign())
        for kid in ("secret", "leaked"):
            assert "no key with the id" in refused(tokens, issuer.sign(header={"kid": kid}))[2]


async def test_few_tokens_are_kept(issuer: Issuer, autojump_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_VERIFIED", 3)
    async with issuer.tokens() as tokens:
        callers = [await shown(tokens, issuer.sign(sub=f"ci-{number}")) for number in range(10)]
        assert len(tokens._verified) == 3
        assert all(tokens.ended(caller.credential) is None for caller in callers)


def test_only_this_host_may_do_without_tls() -> None:
    assert is_safe_url("https://issuer.example/x")
    assert is_safe_url("http://127.0.0.1:3000")
    for url in ("http://a.example", "https://", "ftp://a", "https://u@a", "http://127.0.0.1.example", "https://a:x"):
        assert not is_safe_url(url)


def scope(**changes: Any) -> dict[str, Any]:
    plain = {"type": "http", "raw_path": b"/api/v1/vms", "headers": [], "query_string": b"", "client": ("192.0.2.1", 1)}
    return plain | {"state": {}} | changes


async def test_a_token_comes_as_a_key_does(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        access = Access(ApiSettings(), tokens=tokens)
        assert access.asks_for_key
        token = issuer.sign()
        for asked in (
            scope(headers=[(b"authorization", b"Bearer " + token)]),
            scope(headers=[(b"x-volant-api-key", token)]),
            scope(query_string=b"api_key=" + token),
        ):
            await access.prepare(asked)
            assert access.authenticate(asked, in_query=True).name == "oidc:ann"
        with pytest.raises(Problem, match="requires an API key"):
            access.authenticate(scope(), in_query=False)
        assert access.authenticate(scope(raw_path=b"/api/v1/auth"), in_query=False).name == "anonymous"


async def test_one_valid_credential_is_enough(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        access = Access(ApiSettings(api_keys=("key-0123456789abcdef",)), tokens=tokens)
        foreign = (b"authorization", b"Bearer " + issuer.sign(aud="another"))
        key = (b"x-volant-api-key", b"key-0123456789abcdef")
        for headers in ([foreign, key], [key, foreign]):
            assert access.authenticate(scope(headers=headers), in_query=False).name.startswith("key ")
        with pytest.raises(Problem, match="the token is not valid here"):
            access.authenticate(scope(headers=[foreign]), in_query=False)


async def test_what_is_open_ends_with_its_token(issuer: Issuer, autojump_clock: Any) -> None:
    async with issuer.tokens() as tokens:
        access = Access(ApiSettings(), tokens=tokens)
        caller = tokens.caller(issuer.sign(), "192.0.2.1")
        with access.running.add(caller, trio.Event()) as ending:
            access.recheck()
            assert not ending.is_set()
            issuer.later(661)
            access.recheck()
            assert ending.reason == "the token has expired"
