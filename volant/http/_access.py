"""Access control: the checks that come before any route.

They run in this order, so that a refused client learns as little as possible:

1. The client's address, against `VOLANT_API_ALLOW_CIDR`: 403. Behind a proxy of `VOLANT_TRUSTED_PROXIES` it is the last
   address in `X-Forwarded-For` that is not a trusted proxy's; any client can forge the addresses before that one.
2. `Host`: 421. An open web page can send requests to loopback, and can even read the answers by rebinding its name to
   127.0.0.1 (DNS rebinding). But its requests still have its own name in `Host`.
3. `Origin` on unsafe methods and WebSockets: 403. `Sec-Fetch-Site` on all requests: a request by a page of another site
   is 403, except for documents that pages may link to, and for origins in `VOLANT_CORS_ORIGINS`.
4. The API key or the issuer's token, the session of a page that has signed in, or the client's certificate: 401. There
   is no such check for a browser's preflight, which can't have a key; for `/healthz`, `/api/v1/auth`, `/docs` and the
   files of the console, which show nothing of this daemon's VMs; and for the paths at which a browser signs in.

A Unix socket has its own permissions and skips the first and the last check. All checks together take a few
microseconds. A reload of the settings replaces them.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import msgspec

from volant.model import ANONYMOUS, Caller, Problem, SignIn

from ._addresses import LOCAL, PortOrigin, domains_of, is_in, parse_client, parse_port_origin
from ._caller_limits import CallerLimits, CallerUse
from ._ending import Running
from ._keys import (
    NOBODY,
    OF_ISSUER,
    Keys,
    NamedKeys,
    NoNamedKeys,
    NoTokens,
    OtherTickets,
    Tickets,
    Tokens,
    digest_of,
    is_token,
)
from ._sessions import OF_SESSION, SESSION_S, NewSession, Sessions
from ._settings import ApiSettings
from ._sign_ins import NewAttempt, SignIns
from ._subjects import PREFIX, Subjects
from ._tls import ClientCertificate

Header = tuple[bytes, bytes]


_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_REMEMBERED = 256
_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\[\]:@/?#\\\s]+))(?::(?P<port>[0-9]{0,5}))?\Z")
_OWN_SITE = frozenset({b"same-origin", b"none"})
"""`Sec-Fetch-Site` of requests by the daemon's own pages, and of requests that a user started by entering an
address."""
_OF_GUEST = re.compile(rb"/api/v1/vms/[a-z0-9-]{1,63}/(?:agent|ports/[0-9]{1,5})(?:/|\Z)")
CALLBACK = "/api/v1/session/oidc/callback"
"""The path to which an issuer sends a browser back."""
_DOCUMENTS = frozenset({b"/", b"/docs", b"/openapi.json", CALLBACK.encode()})
_PREFLIGHT_AGE = b"600"
_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_KEYLESS = (b"/", b"/healthz", b"/docs", b"/api/v1/auth", CALLBACK.encode())
_KEYLESS_BELOW = b"/console/"
_SIGN_IN = frozenset({b"/api/v1/session", b"/api/v1/session/oidc", b"/api/v1/session/oidc/finish"})
"""The paths to which a browser posts to sign in."""
_PROOF = b"volant-session"
_COOKIE = "volant-session"
_ATTEMPT = "volant-sign-in"
_GRANT = "volant-port"
_SECURE = "__Host-"
_OPEN = "/.volant/open"
"""The path at the origin of a port at which a browser redeems a ticket for a grant."""
_IN_QUERY = (b"api_key", b"ticket")
_MAX_TICKET = 200


class Access:
    """Checks requests by the settings in force."""

    def __init__(self, settings: ApiSettings, named: NamedKeys | None = None, tokens: Tokens | None = None) -> None:
        self._rules = _Rules(settings)
        self._tokens: Tokens = tokens or NoTokens()
        self._named: NamedKeys = named or NoNamedKeys()
        self.tickets = Tickets()
        self._other_tickets: OtherTickets | None = None
        self.sessions = Sessions(self.recheck)
        self.sign_ins = SignIns()
        self.running = Running()
        self.use = CallerUse()
        self.failures: Counter[str] = Counter()
        """The number of requests refused for their credentials, by error code."""

    @property
    def asks_for_key(self) -> bool:
        """Whether a client over TCP needs a key, a token or a certificate."""
        return self._has_keys or bool(self._rules.subjects)

    @property
    def caller_limits(self) -> CallerLimits:
        """The limits of one caller."""
        return self._rules.settings.caller_limits

    @property
    def asks_for_certificate(self) -> bool:
        """Whether a client needs a certificate, because there are neither keys nor tokens."""
        return bool(self._rules.subjects) and not self._has_keys

    @property
    def has_administrator(self) -> bool:
        """Whether the settings give the role `admin` to a key, a certificate's subject or a token's claim."""
        return bool(self._rules.keys) or self._rules.subjects.has_administrator or self._tokens.has_administrator

    @property
    def sign_in(self) -> SignIn | None:
        """Returns the data that a client needs to get a token; None if no tokens are accepted."""
        return self._tokens.sign_in

    @property
    def signs_in_browsers(self) -> bool:
        """Whether browsers can sign in at an issuer."""
        return self._tokens.signs_in_browsers

    @property
    def _has_keys(self) -> bool:
        return bool(self._rules.keys) or self._named.required or self._tokens.accepted

    def replace(self, settings: ApiSettings) -> None:
        """Applies other settings from now on. If the keys change, all tickets become invalid. Requests with invalid
        credentials end."""
        if settings.api_keys != self._rules.settings.api_keys:
            self.tickets.clear()
        self._rules = _Rules(settings)
        self.recheck()

    def join(self, host: str, others: OtherTickets) -> None:
        """Adds this daemon to a fleet: its tickets are valid on the other hosts, and theirs on this one."""
        self.tickets.issuer = host
        self._other_tickets = others

    def recheck(self) -> None:
        """Ends the requests of callers whose credentials have become invalid."""
        self.running.recheck(self._ended)

    def check(self, scope: Any) -> PortOrigin | None:
        """Checks address, `Host` and `Origin`. Returns the port of a VM if `Host` is the origin of one.

        :raises Problem: 421 or 403.
        """
        return self._rules.check(scope) if _forwarded(scope) is None else None

    async def prepare(self, scope: Any, *, in_query: bool = False) -> None:
        """Waits until `authenticate` can verify the token or the ticket of a request, if it has one.

        :raises Problem: 503, too many requests wait for the keys of the issuer.
        """
        if in_query and self._other_tickets is not None and self.asks_for_key and _forwarded(scope) is None:
            await self._redeem_elsewhere(self._other_tickets, scope)
        if not self._tokens.accepted or scope["state"].get("unix") or _is_keyless(scope) or _forwarded(scope):
            return
        for _, value in _in_headers(scope["headers"]):
            if is_token(value):
                await self._tokens.prepare(value)
        for _, value in _credentials(scope["query_string"]):
            if is_token(value):
                await self._tokens.prepare(value)

    async def _redeem_elsewhere(self, others: OtherTickets, scope: Any) -> None:
        for name, value in _credentials(scope["query_string"]):
            host, dot, _ = value.rpartition(b".")
            if name == b"ticket" and dot and host != self.tickets.issuer.encode() and len(value) < _MAX_TICKET:
                path = scope["raw_path"].decode("ascii")
                scope["state"]["redeemed"] = await others.redeem(host.decode("latin-1"), value, path)
                return

    def authenticate(self, scope: Any, *, in_query: bool) -> Caller:
        """Returns the caller, see `_authenticate`, and counts failures."""
        try:
            return self._authenticate(scope, in_query=in_query)
        except Problem as refused:
            self.failures[refused.code] += 1
            raise

    def _authenticate(self, scope: Any, *, in_query: bool) -> Caller:
        """Returns the caller, identified by the key, token or ticket of the request, or by the client's certificate.

        :param in_query: whether credentials may be in the query, for requests that browsers send without headers
        :raises Problem: 401, there are no valid credentials; 403, the token has no role; 503, the keys of the issuer
            are unknown.
        """
        if (forwarded := _forwarded(scope)) is not None:
            return forwarded
        if scope["state"].get("unix"):
            user = str(scope["state"]["peer"])
            return Caller(user, user, address=user)
        address = self.client(scope)
        if not self.asks_for_key or _is_keyless(scope):
            return msgspec.structs.replace(NOBODY, address=address)
        shown = False
        refused: Problem | None = None
        for _, value in _in_headers(scope["headers"]):
            shown = True
            try:
                caller = self._caller(value, address)
            except Problem as problem:
                # Another one may be valid: a proxy may have added its own token.
                refused = problem
                continue
            if caller is not None:
                return caller
        ticket = False
        for name, value in _credentials(scope["query_string"]):
            if not in_query:
                raise _unauthenticated(
                    f"{name.decode()} in the query is accepted only on WebSockets and event streams",
                    "send the key as X-Volant-API-Key",
                )
            shown = True
            ticket = ticket or name == b"ticket"
            if name == b"ticket":
                caller = scope["state"].pop("redeemed", None)
                caller = caller or self.tickets.redeem(value, scope["raw_path"].decode("ascii"))
                if caller is not None and (reason := self._ended(caller)) is not None:
                    raise _unauthenticated(f"the ticket is not valid any more: {reason}", None)
                caller = caller and msgspec.structs.replace(caller, address=address)
            else:
                caller = self._caller(value, address)
            if caller is not None:
                return caller
        if refused is not None:
            raise refused
        if ticket:
            raise _unauthenticated(
                "the ticket is used, expired, for another path, or not from this daemon",
                "get another with POST /api/v1/tickets",
            )
        if shown:
            raise _unauthenticated("the API key is not one of this daemon's", None)
        proof = _header(scope, _PROOF)
        if proof is not None:
            return self._of_session(scope, proof, address)
        if self._rules.subjects:
            return self._subject(scope["state"].get("certificate"), address)
        raise _unauthenticated(
            "this daemon requires an API key, a client certificate or a token",
            "send a key as X-Volant-API-Key or Authorization: Bearer; volar takes it from VOLANT_API_KEY or "
            "--api-key-file, and `volar login` gets a token where the daemon has an issuer",
        )

    async def sign_in_with(self, scope: Any, given: str) -> NewSession:
        """Begins a session for a browser that has sent a key or a token.

        :raises Problem: 401, it is not valid; 403, the token has no role; 409, no key is required; 503, the keys of the
            issuer are unknown, or there are too many sessions.
        """
        key = given.strip().encode()
        self._check_needed(scope)
        try:
            if self._tokens.accepted and is_token(key):
                await self._tokens.prepare(key)
            caller = self._caller(key, self.client(scope))
            if caller is None:
                raise _unauthenticated("the API key is not one of this daemon's", None)
        except Problem as refused:
            self.failures[refused.code] += 1
            raise
        return self.sessions.open(caller)

    def _check_needed(self, scope: Any) -> None:
        if not self.asks_for_key or scope["state"].get("unix"):
            raise Problem(409, "no-key-needed", "this daemon requires no key here")

    async def begin_sign_in(self, scope: Any) -> NewAttempt:
        """Starts signing in a browser at the issuer.

        :raises Problem: 409, no key is required, or there is no issuer for browsers; 503, the issuer does not answer.
        """
        self._check_needed(scope)
        secure, netloc = self.own_address(scope)
        request = await self._tokens.begin(f"{'https' if secure else 'http'}://{netloc}{CALLBACK}")
        return self.sign_ins.begin(request, self.client(scope))

    async def take_answer(self, scope: Any, answer: Mapping[str, str]) -> None:
        """Handles the issuer's answer with which a browser returns; see `SignIns.take`."""
        await self.sign_ins.take(self._attempts(scope), answer)

    def finish_sign_in(self, scope: Any, proof: str) -> NewSession:
        """Finishes a sign-in at the issuer, and begins the session.

        :raises Problem: see `SignIns.finish` and `sign_in_with`.
        """
        self._check_needed(scope)
        try:
            caller = self.sign_ins.finish(self._attempts(scope), proof)
            if (reason := self._ended(caller)) is not None:
                raise _unauthenticated(reason, "sign in again")
        except Problem as refused:
            self.failures[refused.code] += 1
            raise
        return self.sessions.open(caller)

    def _attempts(self, scope: Any) -> Iterable[bytes]:
        return cookies(scope["headers"], self._cookie_name(scope, _ATTEMPT))

    def attempt_cookie(self, scope: Any, value: str, max_age_s: float) -> bytes:
        """Returns the value of `Set-Cookie` for the part of a sign-in attempt that scripts can't read.

        The issuer's site sends the browser back, hence `SameSite=Lax`.
        """
        return self._cookie(scope, _ATTEMPT, value, max_age_s, "Lax")

    def session_left_s(self, caller: Caller) -> float | None:
        """Returns the remaining seconds of a caller's session; None if it has none."""
        if not caller.credential.startswith(OF_SESSION):
            return None
        return self.sessions.left_s(caller.credential, self._left_s)

    def _left_s(self, caller: Caller) -> float:
        return self._tokens.left_s(caller.credential) if caller.credential.startswith(OF_ISSUER) else SESSION_S

    def sign_out(self, caller: Caller) -> None:
        """Ends the session of a caller, and its requests and streams."""
        if caller.credential.startswith(OF_SESSION):
            self.sessions.close(caller.credential)

    def cookie(self, scope: Any, value: str, max_age_s: float) -> bytes:
        """Returns the value of `Set-Cookie` for the part of a session that scripts can't read.

        The prefix prevents others, such as a page of this name without TLS, from setting it (RFC 6265bis, 4.1.3).
        """
        return self._cookie(scope, _COOKIE, value, max_age_s, "Strict")

    def _cookie(self, scope: Any, name: str, value: str, max_age_s: float, same_site: str) -> bytes:
        more = "; Secure" if self._rules.is_tls(scope) else ""
        name = self._cookie_name(scope, name)
        return f"{name}={value}; Path=/; Max-Age={max_age_s:.0f}; HttpOnly; SameSite={same_site}{more}".encode()

    def _cookie_name(self, scope: Any, name: str) -> str:
        return f"{_SECURE}{name}" if self._rules.is_tls(scope) else name

    def port_address(self, scope: Any, vm_id: int, port: int) -> str | None:
        """Returns the address of a port's own origin, for the client of a checked request. It is below `localhost` on
        loopback, otherwise below the name that the client uses, or another name for ports. None if there is none.
        """
        secure, netloc = self.own_address(scope)
        parts = urlsplit(f"//{netloc}")
        name = parts.hostname or ""
        if _is_loopback(name):
            domain = LOCAL
        else:
            others = sorted(self._rules.domains - {LOCAL})
            if not others:
                return None
            domain = name if name in others else others[0]
        suffix = "" if parts.port is None else f":{parts.port}"
        return f"{'https' if secure else 'http'}://{port}-{vm_id}.{domain}{suffix}"

    def port_ticket(self, caller: Caller, vm_id: int, port: int) -> str | None:
        """Returns a ticket for a grant, which the origin of a port redeems; None if no caller needs one."""
        if not self.asks_for_key:
            return None
        return self.tickets.issue(caller.id, path=f"{_OPEN}/{vm_id}/{port}", caller=caller)

    def grant(self, scope: Any, ticket: str, vm_id: int, port: int) -> bytes:
        """Redeems a ticket at the origin of a port, and returns the `Set-Cookie` of the grant.

        `SameSite=Lax`, because cross-site links may lead to the server in the guest, as to any other server.

        :raises Problem: 401, the ticket is not valid.
        """
        caller = self.tickets.redeem(ticket.encode(), f"{_OPEN}/{vm_id}/{port}")
        if caller is None or self._ended(caller) is not None:
            raise _unauthenticated("this link was used, or is older than a minute", "open the port again")
        return self._cookie(scope, _GRANT, self.sessions.grant(caller, (vm_id, port)), SESSION_S, "Lax")

    def authenticate_at_port(self, scope: Any, vm_id: int, port: int) -> Caller:
        """Returns the caller of a request at the origin of a port, from its grant. Keys and tokens are for the guest
        there, and are ignored.

        :raises Problem: 401, it has no grant
        """
        if scope["state"].get("unix"):
            user = str(scope["state"]["peer"])
            return Caller(user, user, address=user)
        address = self.client(scope)
        if not self.asks_for_key:
            return msgspec.structs.replace(NOBODY, address=address)
        for value in cookies(scope["headers"], self._cookie_name(scope, _GRANT)):
            caller = self.sessions.find_grant(value, (vm_id, port))
            if caller is not None and self._ended(caller) is None:
                return msgspec.structs.replace(caller, address=address)
        if self._rules.subjects and (certificate := scope["state"].get("certificate")) is not None:
            return self._subject(certificate, address)
        raise _unauthenticated("this port of a VM needs a grant", "open it from the web console, under Ports of its VM")

    def _of_session(self, scope: Any, proof: bytes, address: str) -> Caller:
        """Returns the caller of the session of a page. :raises Problem: 401, there is none; 403, the page is not the
        daemon's."""
        self._rules.check_page(scope)
        for value in cookies(scope["headers"], self._cookie_name(scope, _COOKIE)):
            caller = self.sessions.find(value, proof)
            if caller is not None and self._ended(caller) is None:
                return msgspec.structs.replace(caller, address=address)
        raise Problem(401, "session-ended", "this session has ended, or was never begun", hint="sign in again")

    def client(self, scope: Any) -> str:
        """Returns the address of the client of a request, or the user at a Unix socket.

        Behind a trusted proxy it is the address that the proxy reports.
        """
        if (forwarded := _forwarded(scope)) is not None:
            return forwarded.address
        if scope["state"].get("unix"):
            return str(scope["state"]["peer"])
        if scope["client"] is None:
            return "an unknown address"
        return self._rules.client(scope["client"][0], scope["headers"])[:100]

    def _ended(self, caller: Caller) -> str | None:
        """Returns why a caller's credentials are not valid any more; None if they are valid."""
        if not caller.credential:
            return None
        if caller.credential == ANONYMOUS:
            return "this daemon requires an API key now" if self.asks_for_key else None
        if caller.credential.startswith(OF_SESSION):
            return self.sessions.ended(caller.credential, self._ended)
        if caller.credential.startswith(OF_ISSUER):
            return self._tokens.ended(caller.credential)
        if caller.credential.startswith(PREFIX):
            return self._rules.subjects.ended(caller.credential)
        if self._rules.keys.accept(bytes.fromhex(caller.credential)):
            return None
        return self._named.ended(caller.credential)

    def _caller(self, given: bytes, address: str) -> Caller | None:
        """Returns the caller with this key or token; None if no key matches.

        :raises Problem: 401, it has expired; for a token see `Tokens.caller`.
        """
        if self._tokens.accepted and is_token(given):
            return self._tokens.caller(given, address)
        digest = digest_of(given)
        digits = digest.hex()
        named = self._named.caller(digits, address)
        if named is not None:
            return named
        if self._rules.keys.accept(digest):
            # With the whole digest, readers of the log could check guesses. 32 bits are enough to tell keys apart, and
            # too few to confirm a guess.
            return Caller(digits, f"key {digits[:8]}", address=address, credential=digits)
        return None

    def _subject(self, certificate: ClientCertificate | None, address: str) -> Caller:
        """Returns the caller with this certificate. :raises Problem: 401, there is none."""
        if certificate is None:
            what = "a client certificate" + (" or an API key" if self._has_keys else "")
            raise _unauthenticated(
                f"this daemon requires {what}", "volar takes the certificate from --client-cert and --client-key"
            )
        caller = self._rules.subjects.caller(certificate, address)
        if caller is None:
            names = "it has expired" if certificate.is_expired else ", ".join(certificate.names)[:200]
            raise _unauthenticated(
                f"the client certificate has no role: {names}", "an administrator gives it one in tls_subjects"
            )
        return caller

    def own_address(self, scope: Any) -> tuple[bool, str]:
        """Returns the daemon's address as the client of a checked request sees it, for URLs in answers: whether it uses
        TLS, and `host[:port]`. These come from the checked `Host`, and from the connection or the `X-Forwarded-Proto`
        of a trusted proxy. For a request passed on by another host of the fleet, that host reports them."""
        forwarded: tuple[bool, str] | None = scope["state"].get("address")
        if forwarded is not None:
            return forwarded
        return self._rules.is_tls(scope), own_netloc(_shown(_header(scope, b"host")))

    def cors(self, scope: Any) -> list[Header]:
        """Returns the CORS headers for any answer. At the origin of a port there are none."""
        origins = self._rules.origins
        if not origins or self._rules.port_origin(_header(scope, b"host")) is not None:
            return []
        origin = _header(scope, b"origin")
        if origin is None or not self._rules.is_allowed(_shown(origin)):
            return [(b"vary", b"Origin")]
        return [
            (b"vary", b"Origin"),
            (b"access-control-allow-origin", origin),
            (b"access-control-expose-headers", b"*"),
        ]

    def preflight(self, scope: Any) -> list[Header] | None:
        """Returns the headers of the answer to a CORS preflight by a page of an allowed origin; None for other
        requests."""
        if scope["type"] != "http" or scope["method"] != "OPTIONS" or not self._rules.origins:
            return None
        origin = _header(scope, b"origin")
        if origin is None or _header(scope, b"access-control-request-method") is None:
            return None
        if not self._rules.is_allowed(_shown(origin)):
            return None
        headers = [
            (b"access-control-allow-methods", _METHODS),
            (b"access-control-max-age", _PREFLIGHT_AGE),
            (b"vary", b"Access-Control-Request-Headers"),
        ]
        wanted = _header(scope, b"access-control-request-headers")
        if wanted is not None:
            # Allow any: we can't list the headers of a guest's API, and `*` does not include Authorization.
            headers.append((b"access-control-allow-headers", wanted))
        return headers


class _Rules:
    """Holds the settings in a form that is fast to check."""

    def __init__(self, settings: ApiSettings) -> None:
        self.settings = settings
        self.keys = Keys(settings.api_keys)
        self.subjects = Subjects(settings.subjects)
        self.origins = {origin.lower().rstrip("/") for origin in settings.cors_origins}
        self._hosts = {name.lower() for name in settings.allowed_hosts}
        self.domains = domains_of(self._hosts)
        self._hosts |= {urlsplit(address).netloc.lower() for address in settings.addresses if "://" in address}
        self._known: dict[tuple[bytes | None, object], bool] = {}
        self._is_proxy = lru_cache(_REMEMBERED)(self._find_proxy)
        self._may_ask = lru_cache(_REMEMBERED)(self._find_client)

    def port_origin(self, host: bytes | None) -> PortOrigin | None:
        """Returns the port of a VM in a `Host`; None for other hosts."""
        return parse_port_origin(_shown(host).lower(), self.domains)

    def check(self, scope: Any) -> PortOrigin | None:
        """Implements `Access.check`."""
        host: bytes | None = None
        origin: bytes | None = None
        site: bytes | None = None
        forwarded: list[bytes] = []
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
            elif name == b"sec-fetch-site":
                site = value
            elif name == b"x-forwarded-for":
                forwarded.append(value)
        if self.settings.allow_cidr and not scope["state"].get("unix"):
            self._check_client(self._last(scope["client"][0], forwarded))
        server = scope.get("server")
        key = (host, server[0] if server else None)
        ours = self._known.get(key)
        if ours is None:
            ours = self._is_ours(host, key[1])
            if len(self._known) < _REMEMBERED and len(host or b"") < _REMEMBERED:
                self._known[key] = ours
        port_origin = None if ours else self.port_origin(host)
        if not ours and port_origin is None:
            raise Problem(
                421,
                "unknown-host",
                f"this daemon is not {_shown(host)!r}",
                hint="add names besides loopback and the listen address to VOLANT_ALLOWED_HOSTS",
            )
        if origin is not None and (scope["type"] == "websocket" or scope["method"] not in _SAFE):
            if port_origin is None:
                self._check_origin(scope, _shown(origin), _shown(host))
            else:
                self._check_own(scope, _shown(origin), _shown(host))
        if site is not None and site not in _OWN_SITE:
            self._check_site(scope, origin, port_origin)
        return port_origin

    def is_tls(self, scope: Any) -> bool:
        """Returns whether the client uses TLS, to the daemon or to a trusted proxy."""
        if scope.get("scheme") in ("https", "wss"):
            return True
        if scope["state"].get("unix") or not self._is_proxy(scope["client"][0]):
            return False
        # The first of several values is the client's protocol to the outermost proxy.
        protocol = _shown(_header(scope, b"x-forwarded-proto")).partition(",")[0].strip().lower()
        return protocol in ("https", "wss")

    def is_allowed(self, origin: str) -> bool:
        """Returns whether this origin is in `VOLANT_CORS_ORIGINS`."""
        return origin.lower().rstrip("/") in self.origins

    def client(self, peer: str, headers: Iterable[Header]) -> str:
        """Returns the address of the client whose request `peer` has sent or forwarded."""
        if not self.settings.trusted_proxies:
            return peer
        return self._last(peer, [value for name, value in headers if name == b"x-forwarded-for"])

    def _last(self, peer: str, forwarded: list[bytes]) -> str:
        client = peer
        if forwarded and self._is_proxy(peer):
            for member in reversed(b",".join(forwarded).split(b",")):
                client = _shown(member).strip()
                if not self._is_proxy(client):
                    break
        return client

    def _check_client(self, client: str) -> None:
        if not self._may_ask(client):
            raise Problem(
                403,
                "address-not-allowed",
                f"requests from {client[:100]} are not allowed",
                hint="add allowed networks to VOLANT_API_ALLOW_CIDR, and proxies to VOLANT_TRUSTED_PROXIES",
            )

    def _find_proxy(self, text: str) -> bool:
        try:
            return is_in(parse_client(text), self.settings.trusted_proxies)
        except ValueError:
            return False

    def _find_client(self, text: str) -> bool:
        try:
            return is_in(parse_client(text), self.settings.allow_cidr)
        except ValueError:
            return False

    def _is_ours(self, host: bytes | None, local: object) -> bool:
        if not host:
            return False
        text = host.decode("latin-1").lower()
        if text in self._hosts:
            return True
        parts = _HOST.match(text)
        if parts is None or int(parts["port"] or 0) > 65535:
            return False
        name = parts["address"] or parts["name"]
        if name == "localhost" or name in self._hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # Browsers and libraries write an address in one way. Another spelling is likely an attempt to evade a check.
        # An operator who needs one adds it to VOLANT_ALLOWED_HOSTS.
        if str(address) != name or (address.version == 6) != bool(parts["address"]):
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            return False
        # Nobody can rebind an address. The address that the client has connected to is ours; a socket for both families
        # shows it as ::ffff:192.0.2.1.
        return address.is_loopback or str(local).removeprefix("::ffff:") == str(address)

    def _check_site(self, scope: Any, origin: bytes | None, port_origin: PortOrigin | None) -> None:
        """Checks a request whose browser says that a page of another site sent it (W3C Fetch Metadata, 2.4).

        Such a page may link to documents: `/docs`, `/openapi.json`, and pages of guests. A guest's page is sandboxed,
        so its browser sends the same headers with its requests, and the daemon can't distinguish the two.
        """
        if port_origin is None and origin is not None and self.is_allowed(_shown(origin)):
            return
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            path = scope["raw_path"]
            top = _header(scope, b"sec-fetch-mode") == b"navigate" and _header(scope, b"sec-fetch-dest") == b"document"
            if top and (port_origin is not None or path in _DOCUMENTS or _OF_GUEST.match(path)):
                return
        raise Problem(
            403,
            "cross-site",
            "pages of other sites may not request this",
            hint="add origins of pages that may use the API to VOLANT_CORS_ORIGINS",
        )

    def check_page(self, scope: Any) -> None:
        """Checks that a request with the session of a page comes from the daemon's own page, if it names its page.

        :raises Problem: 403
        """
        origin = _header(scope, b"origin")
        if origin is None:
            if scope["type"] == "http" and scope["method"] in _SAFE:
                return
            raise Problem(
                403, "foreign-origin", "a request with a session that changes something has to name its Origin",
                hint="without a browser, send a key",
            )  # fmt: skip
        self._check_own(scope, _shown(origin), _shown(_header(scope, b"host")))

    def _check_origin(self, scope: Any, origin: str, host: str) -> None:
        if not self.is_allowed(origin):
            self._check_own(scope, origin, host)

    def _check_own(self, scope: Any, origin: str, host: str) -> None:
        # `host` was checked. A page is ours if its origin is the host of its request. With TLS the page must have come
        # over TLS too, because anybody on the network can forge a page without it.
        schemes = ("https",) if self.is_tls(scope) else ("http", "https")
        try:
            parts = urlsplit(origin)
            own = parts.scheme in schemes and _netloc(parts.netloc, parts.scheme) == _netloc(host, parts.scheme)
        except ValueError:
            own = False
        if not own:
            raise Problem(
                403,
                "foreign-origin",
                f"a page of {origin[:100]!r} may not do this",
                hint="add allowed origins to VOLANT_CORS_ORIGINS",
            )


def _is_loopback(name: str) -> bool:
    try:
        return name == LOCAL or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def own_netloc(host: str) -> str:
    """Returns the name and port of a checked `Host` in normal form."""
    parts = urlsplit(f"//{host}")
    name = parts.hostname or ""
    name = f"[{name}]" if ":" in name else name
    return name if parts.port is None else f"{name}:{parts.port}"


def _netloc(netloc: str, scheme: str) -> str:
    default = ":443" if scheme == "https" else ":80"
    return netloc.lower().removesuffix(default)


def _forwarded(scope: Any) -> Caller | None:
    """Returns the caller of a request that another host of the fleet has checked and passed on."""
    caller: Caller | None = scope["state"].get("forwarded")
    return caller


def for_ticket(scope: Any, caller: Caller) -> Caller:
    """Returns the caller for tickets that a request creates. Its credential is the one that another host of the fleet
    has checked, if any, so that the ticket's requests end with it."""
    return msgspec.structs.replace(caller, credential=scope["state"].get("credential") or caller.credential)


def _is_keyless(scope: Any) -> bool:
    """Returns whether a request needs no credentials."""
    if scope["type"] != "http":
        return False
    path = scope["raw_path"]
    return bool(path in _KEYLESS or path.startswith(_KEYLESS_BELOW) or (path in _SIGN_IN and scope["method"] == "POST"))


def cookies(headers: Iterable[Header], wanted: str) -> Iterable[bytes]:
    """Yields the values of all cookies with a name."""
    for name, value in headers:
        for pair in value.split(b";") if name == b"cookie" else ():
            key, _, text = pair.partition(b"=")
            if key.strip() == wanted.encode():
                yield text.strip()


def _shown(value: bytes | None) -> str:
    return (value or b"").decode("latin-1")[:200]


def _header(scope: Any, wanted: bytes) -> bytes | None:
    for name, value in scope["headers"]:
        if name == wanted:
            return bytes(value)
    return None


def _in_headers(headers: Iterable[Header]) -> Iterable[Header]:
    """Yields the keys and tokens in headers."""
    for name, value in headers:
        if name == b"x-volant-api-key":
            yield name, value.strip()
        elif name == b"authorization" and value[:7].lower() == b"bearer ":
            yield name, value[7:].strip()


def _unauthenticated(detail: str, hint: str | None) -> Problem:
    return Problem(401, "unauthenticated", detail, hint=hint)


def _credentials(query: bytes) -> Iterable[Header]:
    """Yields the credentials among the parameters of a query, decoded."""
    for pair in query.split(b"&") if _may_have_credentials(query) else ():
        name, _, value = (unquote_to_bytes(part.replace(b"+", b" ")) for part in pair.partition(b"="))
        if name in _IN_QUERY:
            yield name, value


def _may_have_credentials(query: bytes) -> bool:
    return b"api" in query or b"ticket" in query or b"%" in query


def without_credentials(query: bytes) -> bytes:
    """Returns the query string without `api_key` and `ticket`. The rest is the same, byte for byte."""
    if not _may_have_credentials(query):
        return query
    return b"&".join(_others(query.split(b"&")))


def _others(pairs: Iterable[bytes]) -> Iterable[bytes]:
    for pair in pairs:
        name = unquote_to_bytes(pair.partition(b"=")[0].replace(b"+", b" "))
        if name not in _IN_QUERY:
            yield pair
