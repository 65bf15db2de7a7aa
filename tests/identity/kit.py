"""An issuer of tokens in memory: its documents, its keys, and what it signs."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs, urlsplit

import trio
import trio.testing
from joserfc import jwt
from joserfc.jwk import ECKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

from volant.host import Host
from volant.identity import IssuerTokens, OidcSettings, parse_role_rule
from volant.identity._code_flow import Reply
from volant.identity._issuer import Document, IssuerError

ISSUER = "https://issuer.example"
AUDIENCE = "volar"
CLIENT = "console"
"""The client that browsers sign in with. No bearer token has it as its audience."""
Signing = RSAKey | ECKey | OKPKey


class Clock:
    """A time of day that tests set."""

    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time

    def monotonic(self) -> float:
        return trio.current_time()

    def boottime(self) -> float:
        return trio.current_time()


class Issuer:
    """Answers for its URLs, and signs."""

    def __init__(self) -> None:
        self.host = Host()
        self.clock = Clock()
        self.host.clock = self.clock
        self.key: Signing = ec("one")
        self.published: list[Signing] = [self.key]
        self.is_down = False
        self.answers = trio.Event()
        """Set unless a test holds its answers back."""
        self.answers.set()
        self.fetched = 0
        self.discovery: dict[str, Any] = {
            "issuer": ISSUER,
            "jwks_uri": f"{ISSUER}/jwks",
            "authorization_endpoint": f"{ISSUER}/authorize?tenant=1",
            "token_endpoint": f"{ISSUER}/token",
        }
        self.codes: dict[str, tuple[dict[str, str], bytes]] = {}
        """What each code was asked for with, and the ID token that it gives."""
        self.posted: list[tuple[dict[str, str], tuple[str, str] | None]] = []

    async def fetch(self, url: str) -> Document:
        await self.answers.wait()
        if self.is_down:
            raise IssuerError(f"{url}: connection refused")
        if url.endswith("/.well-known/openid-configuration"):
            return Document(json.dumps(self.discovery).encode())
        self.fetched += 1
        return Document(json.dumps({"keys": [key.as_dict(private=False) for key in self.published]}).encode())

    def authorize(self, url: str, **claims: Any) -> dict[str, str]:
        """Signs a person in whose browser was sent to `url`. Returns the parameters of the answer."""
        assert url.startswith(f"{ISSUER}/authorize?tenant=1&")
        asked = {name: value for name, [value] in parse_qs(urlsplit(url).query).items()}
        code = f"code-{len(self.codes)}"
        token = self.sign(**{"aud": CLIENT, "nonce": asked["nonce"]} | claims)
        self.codes[code] = (asked, token)
        return {"code": code, "state": asked["state"]}

    async def post(self, url: str, form: Mapping[str, str], login: tuple[str, str] | None) -> Reply:
        """Answers as the token endpoint."""
        assert url == f"{ISSUER}/token"
        self.posted.append((dict(form), login))
        await self.answers.wait()
        if self.is_down:
            raise IssuerError(f"{url}: connection refused")
        asked, token = self.codes.pop(form["code"], ({}, b""))
        challenge = urlsafe_b64encode(sha256(form["code_verifier"].encode()).digest()).rstrip(b"=").decode()
        if (challenge, form["redirect_uri"]) != (asked.get("code_challenge"), asked.get("redirect_uri")):
            return Reply(400, b'{"error": "invalid_grant", "error_description": "<b>\\u202e"}')
        return Reply(200, json.dumps({"access_token": "x", "id_token": token.decode()}).encode())

    def rotate(self, key: Signing) -> None:
        self.key = key
        self.published = [key]

    def claims(self, **changes: Any) -> dict[str, Any]:
        now = int(self.clock.time.timestamp())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "groups": ["web"], "iat": now, "exp": now + 600}
        return {name: value for name, value in (claims | changes).items() if value is not None}

    def sign(self, *, header: dict[str, Any] | None = None, **changes: Any) -> bytes:
        kinds = {"RSA": "RS256", "EC": "ES256", "OKP": "Ed25519"}
        protected = {"alg": kinds[self.key.key_type], "kid": self.key.kid, "typ": "JWT"} | (header or {})
        registry = JWSRegistry(algorithms=[protected["alg"]], strict_check_header=False)
        return jwt.encode(protected, self.claims(**changes), self.key, registry=registry).encode()

    def later(self, seconds: float) -> None:
        self.clock.time += timedelta(seconds=seconds)

    def settings(self, *rules: str) -> OidcSettings:
        return OidcSettings(
            issuer=ISSUER,
            audiences=(AUDIENCE, "other"),
            rules=tuple(map(parse_role_rule, rules or ("groups=ops:admin", "groups=web:operator:web"))),
            client_id=CLIENT,
            scopes="profile offline_access",
            browsers=True,
        )

    @asynccontextmanager
    async def tokens(self, *rules: str) -> AsyncIterator[IssuerTokens]:
        """Runs the daemon's side, after its first fetch."""
        tokens = IssuerTokens(self.host, self.settings(*rules), self.fetch, self.post)
        self.rechecks = 0

        def recheck() -> None:
            self.rechecks += 1

        async with trio.open_nursery() as nursery:
            await nursery.start(tokens.keep, recheck)
            await trio.testing.wait_all_tasks_blocked()
            yield tokens
            nursery.cancel_scope.cancel()


def ec(kid: str) -> ECKey:
    return ECKey.generate_key("P-256", {"kid": kid, "use": "sig"})
