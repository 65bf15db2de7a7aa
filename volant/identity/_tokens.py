"""Identifies callers by tokens of an OpenID Connect issuer. Verifies each token once, and keeps its digest until it
expires."""

from __future__ import annotations

import warnings
from binascii import Error, a2b_base64
from collections import OrderedDict
from collections.abc import Callable
from hashlib import sha256
from importlib.util import find_spec
from typing import Any

import msgspec
import trio

from volant.host import Host
from volant.http import OF_ISSUER
from volant.model import Caller, Problem, Role, SignIn

from ._claims import Claims, Grant, RoleRule, RoleRules, name_of
from ._code_flow import CodeClient, CodeFlow, HasSecret, Post
from ._fetch import fetch_document, post_form
from ._issuer import Fetch, IssuerError, IssuerKeys

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA", "Ed25519")
"""Only algorithms with a public and a private key: with others, the published keys would be enough to sign."""
SKEW_S = 60
"""Maximum difference between the clocks of the issuer and the daemon."""
MAX_VERIFIED = 4096
"""Maximum verified tokens that are kept. The least recently used one is removed, and verified again at its next use."""
MAX_TOKEN = 16 * 1024
"""Maximum bytes of a token, and of each of its parts."""
_CHECK_S = 60.0
"""Maximum time between two checks for expired tokens, because the clock may be set in between."""
_LEAST_CHECK_S = 0.5
"""Minimum time between two checks."""
_TYPES = {None, "jwt", "at+jwt", "application/at+jwt"}
"""Other types, such as logout tokens, don't identify a caller."""


class OidcSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The issuer and audiences of accepted tokens, and the rules for their roles."""

    issuer: str
    audiences: tuple[str, ...]
    rules: tuple[RoleRule, ...]
    name_claim: str = "sub"
    client_id: str
    """The client with which `volar login` and browsers sign in."""
    client_secret: HasSecret | None = None
    """The secret of that client, only for browsers."""
    scopes: str
    browsers: bool = False
    """Whether browsers sign in with that client."""


class _Verified(msgspec.Struct, frozen=True):
    caller: Caller
    expires: float
    """The expiry in seconds since the epoch, including the skew."""


def oidc_obstacle() -> str | None:
    """Returns why this installation can't verify tokens; None if it can."""
    if find_spec("joserfc") is None or find_spec("httpx") is None:
        return "joserfc or httpx is not installed: run `pip install 'volant[oidc]'` and restart the daemon"
    return None


class IssuerTokens:
    """Verifies tokens of the issuer in the settings, if there is one."""

    def __init__(
        self, host: Host, settings: OidcSettings | None, fetch: Fetch = fetch_document, post: Post = post_form
    ) -> None:
        self._host = host
        self._fetch = fetch
        self._post = post
        self._verified: OrderedDict[bytes, _Verified] = OrderedDict()
        self._ends: set[float] = set()
        """The expiries of tokens with which browsers have signed in, including the skew."""
        self._new = trio.Event()
        self._replaced = trio.Event()
        self._settings: OidcSettings | None = None
        self._keys: IssuerKeys | None = None
        self._take(settings)

    def replace(self, settings: OidcSettings | None) -> None:
        """Applies other settings to tokens from now on. Call `Access.recheck` afterwards."""
        if settings != self._settings:
            self._take(settings)
            self._replaced.set()

    def _take(self, settings: OidcSettings | None) -> None:
        before, self._settings = self._settings, settings
        self._verified.clear()
        self._rules = self._rules_of_browsers = RoleRules(())
        if settings is None:
            self._keys = None
            return
        self._rules = RoleRules(settings.rules, (settings.issuer, settings.audiences))
        if settings.browsers:
            # So a session ends when the client is another one, as other tokens end with their audience.
            self._rules_of_browsers = RoleRules(settings.rules, (settings.issuer, "browsers", settings.client_id))
        if before is None or before.issuer != settings.issuer or self._keys is None:
            self._keys = IssuerKeys(settings.issuer, self._fetch, self._verified.clear)

    async def keep(
        self, recheck: Callable[[], None], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Fetches the issuer's keys, and calls `recheck` whenever a token has expired, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_expiry, recheck)
            task_status.started()
            while True:
                self._replaced = trio.Event()
                async with trio.open_nursery() as fetching:
                    if self._keys is not None:
                        fetching.start_soon(self._keys.keep)
                    await self._replaced.wait()
                    fetching.cancel_scope.cancel()

    # For access control

    @property
    def accepted(self) -> bool:
        """Whether an issuer is set."""
        return self._settings is not None

    @property
    def has_administrator(self) -> bool:
        """Whether a token can give the role `admin`."""
        return self._settings is not None and any(rule.role is Role.ADMIN for rule in self._settings.rules)

    @property
    def sign_in(self) -> SignIn | None:
        """Returns the data that a client needs to sign in; None if no issuer is set."""
        settings = self._settings
        return None if settings is None else SignIn(settings.issuer, settings.client_id, settings.scopes)

    @property
    def signs_in_browsers(self) -> bool:
        """Whether browsers can sign in at the issuer."""
        return self._settings is not None and self._settings.browsers

    async def begin(self, redirect_uri: str) -> CodeFlow:
        """Begins a sign-in of a browser, which the issuer sends back to `redirect_uri`; may take seconds.

        :raises Problem: 409, there is no issuer for browsers; 503, it does not answer.
        """
        settings, keys = self._settings, self._keys
        if settings is None or keys is None or not settings.browsers:
            raise Problem(
                409, "no-browser-sign-in", "this daemon has no issuer at which browsers can sign in",
                hint="sign in with a key; an administrator sets oidc_issuer and oidc_client_id",
            )  # fmt: skip
        try:
            endpoints = await keys.discover()
        except IssuerError as error:
            raise _unreachable(str(error), retry_after_s=10) from None

        async def verify(token: bytes, nonce: str, address: str) -> Caller:
            return await self._verify_sign_in(settings, token, nonce, address)

        client = CodeClient(
            issuer=settings.issuer, client_id=settings.client_id, secret=settings.client_secret, scopes=settings.scopes
        )
        return CodeFlow(client, endpoints, redirect_uri, self._post, verify)

    async def _verify_sign_in(self, settings: OidcSettings, token: bytes, nonce: str, address: str) -> Caller:
        """Returns the caller with an ID token from a sign-in. The token is not kept: it may have an audience that
        bearer tokens must not have. :raises Problem: see `caller`, and if the settings have changed in the meantime.
        """
        await self.prepare(token)
        if settings is not self._settings:
            raise _invalid("the settings of the issuer have changed meanwhile")
        found = self._verify(token, nonce)
        if len(self._ends) < MAX_VERIFIED:  # Above this, streams end up to a minute late.
            self._ends.add(found.expires)
            self._new.set()
        return msgspec.structs.replace(found.caller, address=address)

    async def prepare(self, token: bytes) -> None:
        """Fetches the issuer's keys again if the key that signed this token is unknown; may take seconds.

        :raises Problem: 503, too many requests wait for the keys.
        """
        if self._keys is None or len(token) > MAX_TOKEN or sha256(token).digest() in self._verified:
            return
        try:
            kid = _kid(_header(token))
        except Problem:
            return  # `caller` raises it.
        try:
            await self._keys.fetch_if_unknown(kid)
        except IssuerError as error:
            raise _unreachable(str(error), retry_after_s=1) from None

    def caller(self, token: bytes, address: str) -> Caller:
        """Returns the caller with this token.

        :raises Problem: 401, `invalid-token`, `token-expired`; 403, `no-role`; 503, the issuer's keys are unknown.
        """
        digest = sha256(token).digest()
        known = self._verified.get(digest)
        if known is None:
            known = self._verify(token)
            self._verified[digest] = known
            if len(self._verified) > MAX_VERIFIED:
                self._verified.popitem(last=False)
            self._new.set()
        elif known.expires <= self._now():
            del self._verified[digest]
            raise _expired()
        else:
            self._verified.move_to_end(digest)
        return msgspec.structs.replace(known.caller, address=address)

    def ended(self, credential: str) -> str | None:
        """Returns why the token of a caller is not valid any more; None if it is valid."""
        _, expires, version = credential.split(":")
        if float(expires) <= self._now():
            return _expired().detail
        is_in_force = self._rules.has(version) or self._rules_of_browsers.has(version)
        return None if is_in_force else "the role of the token was changed or removed"

    def left_s(self, credential: str) -> float:
        """Returns the remaining seconds of a caller's token."""
        return max(0.0, float(credential.split(":")[1]) - self._now())

    def _verify(self, token: bytes, nonce: str | None = None) -> _Verified:
        """Verifies a token. `nonce` is that of its sign-in; None for any."""
        settings, keys = self._settings, self._keys
        if settings is None or keys is None:
            raise _invalid("this daemon accepts no tokens")
        if len(token) > MAX_TOKEN:
            raise _invalid(f"it is longer than {MAX_TOKEN} bytes")
        claims, expires = self._claims(token, settings, keys, nonce)
        subject = claims.get("sub")
        if not isinstance(subject, str) or not subject or len(subject) > 255:
            raise _invalid("it has no subject of at most 255 characters")
        grant = (self._rules if nonce is None else self._rules_of_browsers).find(claims)
        name = name_of(claims, settings.name_claim)
        if grant is None:
            raise Problem(
                403, "no-role", f"the token of {name!r} is valid, but none of this daemon's rules gives it a role",
                hint="an administrator of the daemon adds a rule to oidc_roles, such as sub=NAME:user",
            )  # fmt: skip
        return _Verified(_caller(settings.issuer, subject, name, grant, expires), expires)

    def _claims(
        self, token: bytes, settings: OidcSettings, keys: IssuerKeys, nonce: str | None
    ) -> tuple[Claims, float]:
        """Returns the claims of a valid token, and its expiry with the skew. :raises Problem: see `caller`."""
        from joserfc.errors import BadSignatureError, ExpiredTokenError, JoseError, SecurityWarning
        from joserfc.jws import JWSRegistry
        from joserfc.jwt import JWTClaimsRegistry, decode

        header = _header(token)
        algorithm, kind = header.get("alg"), header.get("typ")
        if algorithm not in ALGORITHMS:
            raise _invalid(f"it is signed with {str(algorithm)[:20]!r}, and only {', '.join(ALGORITHMS)} are accepted")
        # It may be any JSON value, also one that can't be hashed.
        if kind is not None and (not isinstance(kind, str) or kind.lower() not in _TYPES):
            raise _invalid(f"its type is {str(kind)[:40]!r}, and only access tokens and ID tokens are accepted")
        key = keys.find(_kid(header))
        if key is None:
            if not keys:
                raise _unreachable(f"the keys of {settings.issuer} are not known: {keys.trouble}", retry_after_s=10)
            raise _invalid("the issuer has no key with the id that the token names")
        registry = JWSRegistry(algorithms=list(ALGORITHMS), strict_check_header=False)
        # The library's limits are smaller, but a header may have certificates, and long keys have long signatures.
        registry.max_header_length = registry.max_payload_length = registry.max_signature_length = MAX_TOKEN
        mine: dict[str, Any] = {"aud": {"essential": True, "values": list(settings.audiences)}}
        if nonce is not None:
            # OpenID Connect Core, 3.1.3.7.
            mine = {
                "aud": {"essential": True, "value": settings.client_id},
                "azp": {"value": settings.client_id},
                "nonce": {"essential": True, "value": nonce},
            }
        checks = JWTClaimsRegistry(
            now=int(self._now()),
            leeway=SKEW_S,
            iss={"essential": True, "value": settings.issuer},
            exp={"essential": True},
            **mine,
        )
        try:
            with warnings.catch_warnings():
                # The library warns about the name EdDSA, which issuers still use for Ed25519 (RFC 9864).
                warnings.simplefilter("ignore", SecurityWarning)
                claims: dict[str, Any] = decode(token, key, algorithms=list(ALGORITHMS), registry=registry).claims
            checks.validate(claims)
            if "cnf" in claims:
                raise _invalid("it is bound to a key of its holder, which this daemon can't check")
            return claims, float(claims["exp"]) + SKEW_S
        except BadSignatureError:
            raise _invalid("its signature is wrong") from None
        except ExpiredTokenError:
            raise _expired() from None
        except (JoseError, ValueError, TypeError, OverflowError, RecursionError) as error:
            raise _invalid(str(error)[:200] or type(error).__name__) from None

    def _now(self) -> float:
        return self._host.clock.now().timestamp()

    async def _watch_expiry(self, recheck: Callable[[], None]) -> None:
        while True:
            self._new = trio.Event()
            now = self._now()
            ends = (*(each.expires for each in self._verified.values()), *self._ends)
            soonest = min(ends, default=now + _CHECK_S)
            with trio.move_on_after(min(max(soonest - now, 0), _CHECK_S)):
                await self._new.wait()
            recheck()
            now = self._now()
            for digest in [digest for digest, each in self._verified.items() if each.expires <= now]:
                del self._verified[digest]
            self._ends = {expires for expires in self._ends if expires > now}
            await trio.sleep(_LEAST_CHECK_S)


def _caller(issuer: str, subject: str, name: str, grant: Grant, expires: float) -> Caller:
    return Caller(
        f"{OF_ISSUER}{issuer} {subject}",
        f"{OF_ISSUER}{name}",
        grant.role,
        grant.project,
        credential=f"{OF_ISSUER}{expires:.0f}:{grant.version}",
        limited=True,
    )


def _header(token: bytes) -> dict[str, Any]:
    """Returns the unverified header. :raises Problem: 401, it can't be decoded."""
    text = token.partition(b".")[0]
    try:
        decoded = a2b_base64(text.replace(b"-", b"+").replace(b"_", b"/") + b"=" * (-len(text) % 4))
        return msgspec.json.decode(decoded, type=dict[str, Any])
    except (Error, ValueError, RecursionError):
        raise _invalid("its header can't be decoded") from None


def _kid(header: dict[str, Any]) -> str | None:
    kid = header.get("kid")
    return kid if isinstance(kid, str) else None


def _invalid(why: str) -> Problem:
    return Problem(
        401, "invalid-token", f"the token is not valid here: {why}",
        hint="`volar login` gets another; `volar system info` shows the issuer and the audience",
    )  # fmt: skip


def _unreachable(detail: str, retry_after_s: int) -> Problem:
    return Problem(
        503, "issuer-unreachable", detail, hint="send it again; API keys work meanwhile", retry_after_s=retry_after_s
    )


def _expired() -> Problem:
    return Problem(401, "token-expired", "the token has expired", hint="get another one, as with `volar login`")
