"""Access control: the checks that come before any route.

They run in this order, so that a client that is refused learns as little as possible:

1. The client's address against `VOLANT_API_ALLOW_CIDR`: 403. Behind a proxy of `VOLANT_TRUSTED_PROXIES` it is the last
   address in `X-Forwarded-For` that is no such proxy; any client can forge the addresses before that one.
2. `Host`: 421. A web page that a person has open can send requests to loopback, and by rebinding its name to 127.0.0.1
   can even read the answers; but its requests still carry its own name in `Host`.
3. `Origin` on unsafe methods and WebSockets: 403. `Sec-Fetch-Site` on all requests: a request of another site's page is
   403, except for documents that a link may lead to, and for origins in `VOLANT_CORS_ORIGINS`.
4. The API key: 401. A browser's preflight is answered before this check, as it can't carry a key; so are `/healthz` and
   the page `/docs`, which shows nothing of this daemon.

A Unix socket has permissions of its own and skips the first and the last. All checks together cost some microseconds.
They can be replaced, with the settings, while the daemon runs.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from volant.model import Problem

from ._guesses import Guesses
from ._keys import ANONYMOUS, Keys, Tickets, digest_of
from ._networks import is_in, parse_client
from ._settings import ApiSettings

Header = tuple[bytes, bytes]


_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_REMEMBERED = 256
_HOST = re.compile(r"(?:\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[^\[\]:@/?#\\\s]+))(?::(?P<port>[0-9]{0,5}))?\Z")
_OWN_SITE = frozenset({b"same-origin", b"none"})
"""`Sec-Fetch-Site` of requests from our own pages, and of those that a person began (by typing an address)."""
_OF_GUEST = re.compile(rb"/api/v1/vms/[a-z0-9-]{1,63}/(?:agent|ports/[0-9]{1,5})(?:/|\Z)")
_DOCUMENTS = frozenset({b"/docs", b"/openapi.json"})
_PREFLIGHT_AGE = b"600"
_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
_KEYLESS = (b"/healthz", b"/docs")
_IN_QUERY = (b"api_key", b"ticket")


class Access:
    """The checks, for the settings in force."""

    def __init__(self, settings: ApiSettings) -> None:
        self._rules = _Rules(settings)
        self.tickets = Tickets()
        self._guesses = Guesses()

    @property
    def asks_for_key(self) -> bool:
        """Whether a key is in force."""
        return bool(self._rules.keys)

    def replace(self, settings: ApiSettings) -> None:
        """Applies other settings to requests from now on. If the keys change, all tickets become invalid."""
        if settings.api_keys != self._rules.settings.api_keys:
            self.tickets.clear()
        self._rules = _Rules(settings)

    def check(self, scope: Any) -> None:
        """Checks address, `Host` and `Origin`. :raises Problem: 421 or 403."""
        self._rules.check(scope)

    def authenticate(self, scope: Any, *, in_query: bool) -> str:
        """Checks the key; with `in_query` also as a parameter, for what browsers open without headers.

        Returns the caller: the digest of its key, a user of this host, or `ANONYMOUS`.

        :raises Problem: 401.
        """
        keys = self._rules.keys
        if scope["state"].get("unix"):
            return str(scope["state"]["peer"])
        if not keys or (scope["type"] == "http" and scope["raw_path"] in _KEYLESS):
            return ANONYMOUS
        address = self.client(scope)
        shown = False
        for name, value in scope["headers"]:
            if name == b"x-volant-api-key":
                shown = True
            elif name == b"authorization" and value[:7].lower() == b"bearer ":
                shown = True
                value = value[7:]
            else:
                continue
            caller = self._caller(keys, value.strip(), address)
            if caller is not None:
                return caller
        ticket = False
        for name, value in _credentials(scope["query_string"]):
            if not in_query:
                raise _unauthenticated(
                    f"{name.decode()} in the query counts on WebSockets and event streams alone",
                    "send the key as X-Volant-API-Key",
                )
            shown = True
            ticket = ticket or name == b"ticket"
            if name == b"ticket":
                caller = self.tickets.redeem(value, scope["raw_path"].decode("ascii"))
            else:
                caller = self._caller(keys, value, address)
            if caller is not None:
                return caller
        if ticket:
            raise _unauthenticated(
                "the ticket is used, too old, for another path, or not one of this daemon's",
                "POST /api/v1/tickets gives another",
            )
        if shown:
            raise _unauthenticated("the API key is not one of this daemon's", None)
        raise _unauthenticated(
            "this daemon requires an API key",
            "send X-Volant-API-Key or Authorization: Bearer; volar takes it from VOLANT_API_KEY or --api-key-file",
        )

    def client(self, scope: Any) -> str:
        """Returns the address of the client of a request, or the user at a Unix socket.

        Behind a trusted proxy it is the one that the proxy has seen.
        """
        if scope["state"].get("unix"):
            return str(scope["state"]["peer"])
        if scope["client"] is None:
            return "an unknown address"
        return self._rules.client(scope["client"][0], scope["headers"])[:100]

    def _caller(self, keys: Keys, given: bytes, address: str) -> str | None:
        """Returns the caller with this key, None if it is wrong. :raises Problem: 401 after too many wrong ones."""
        digest = digest_of(given)
        wait_s = self._guesses.wait_s(address, digest)
        if wait_s > 0:
            raise Problem(
                401,
                "too-many-wrong-keys",
                f"too many wrong API keys came from {address}; this one was not looked at",
                hint="send it again in a second",
                retry_after_s=1,
            )
        if keys.accept(digest):
            self._guesses.right(address, digest)
            return digest.hex()
        self._guesses.wrong(address)
        return None

    def own_address(self, scope: Any) -> tuple[bool, str]:
        """Returns how the client of a checked request reaches us, for URLs in answers: whether with TLS, and
        `host[:port]`. The latter is rebuilt from the `Host` that was checked; TLS is known from the connection, or from
        the `X-Forwarded-Proto` of a trusted proxy."""
        return self._rules.is_tls(scope), own_netloc(_shown(_header(scope, b"host")))

    def cors(self, scope: Any) -> list[Header]:
        """Returns the CORS headers of every answer."""
        origins = self._rules.origins
        if not origins:
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
        """Returns the headers of the answer, if this is the CORS preflight of a page of an allowed origin."""
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
            # Any: we can't list what a guest's own API takes, and a `*` does not cover Authorization.
            headers.append((b"access-control-allow-headers", wanted))
        return headers


class _Rules:
    """One set of settings, ready for use."""

    def __init__(self, settings: ApiSettings) -> None:
        self.settings = settings
        self.keys = Keys(settings.api_keys)
        self.origins = {origin.lower().rstrip("/") for origin in settings.cors_origins}
        self._hosts = {name.lower() for name in settings.allowed_hosts}
        self._hosts |= {urlsplit(address).netloc.lower() for address in settings.addresses if "://" in address}
        self._known: dict[tuple[bytes | None, object], bool] = {}
        self._is_proxy = lru_cache(_REMEMBERED)(self._find_proxy)
        self._may_ask = lru_cache(_REMEMBERED)(self._find_client)

    def check(self, scope: Any) -> None:
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
        if not ours:
            raise Problem(
                421,
                "unknown-host",
                f"this daemon is not {_shown(host)!r}",
                hint="add names besides loopback and the listen address to VOLANT_ALLOWED_HOSTS",
            )
        if origin is not None and (scope["type"] == "websocket" or scope["method"] not in _SAFE):
            self._check_origin(_shown(origin), _shown(host))
        if site is not None and site not in _OWN_SITE:
            self._check_site(scope, origin)

    def is_tls(self, scope: Any) -> bool:
        """Whether the client uses TLS, to us or to a trusted proxy."""
        if scope.get("scheme") in ("https", "wss"):
            return True
        if scope["state"].get("unix") or not self._is_proxy(scope["client"][0]):
            return False
        # The first of several values is the client's protocol to the outermost proxy.
        protocol = _shown(_header(scope, b"x-forwarded-proto")).partition(",")[0].strip().lower()
        return protocol in ("https", "wss")

    def is_allowed(self, origin: str) -> bool:
        """Whether an operator has named this origin."""
        return origin.lower().rstrip("/") in self.origins

    def client(self, peer: str, headers: Iterable[Header]) -> str:
        """Returns the address of the client whose request `peer` has sent, or passed on."""
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
                f"this daemon takes no requests from {client[:100]}",
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
        # Browsers and libraries write an address in one way. Another spelling is likely an attempt to evade a check, so
        # an operator who wants one has to name it.
        if str(address) != name or (address.version == 6) != bool(parts["address"]):
            return False
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            return False
        # An address can't be rebound. The one that the client has connected to is ours, which a socket for both
        # families shows as ::ffff:192.0.2.1.
        return address.is_loopback or str(local).removeprefix("::ffff:") == str(address)

    def _check_site(self, scope: Any, origin: bytes | None) -> None:
        """Checks a request that its browser marks as another site's (W3C Fetch Metadata, 2.4).

        A page of another site may link to documents: `/docs`, `/openapi.json`, and what a guest serves. A guest's page
        is sandboxed, so its browser marks its requests as another site's too; they can't be told apart.
        """
        if origin is not None and self.is_allowed(_shown(origin)):
            return
        if scope["type"] == "http" and scope["method"] in ("GET", "HEAD"):
            path = scope["raw_path"]
            top = _header(scope, b"sec-fetch-mode") == b"navigate" and _header(scope, b"sec-fetch-dest") == b"document"
            if top and (path in _DOCUMENTS or _OF_GUEST.match(path)):
                return
        raise Problem(
            403,
            "cross-site",
            "a page of another site may not request this",
            hint="add origins of pages that may use the API to VOLANT_CORS_ORIGINS",
        )

    def _check_origin(self, origin: str, host: str) -> None:
        if self.is_allowed(origin):
            return
        # `host` is one of ours by now. A page is ours if its origin is the host of its request.
        try:
            parts = urlsplit(origin)
            own = parts.scheme in ("http", "https") and _netloc(parts.netloc, parts.scheme) == _netloc(
                host, parts.scheme
            )
        except ValueError:
            own = False
        if not own:
            raise Problem(
                403,
                "foreign-origin",
                f"a page of {origin[:100]!r} may not do this",
                hint="add allowed origins to VOLANT_CORS_ORIGINS",
            )


def own_netloc(host: str) -> str:
    """The name and port in a `Host` that has been checked, in their plainest form."""
    parts = urlsplit(f"//{host}")
    name = parts.hostname or ""
    name = f"[{name}]" if ":" in name else name
    return name if parts.port is None else f"{name}:{parts.port}"


def _netloc(netloc: str, scheme: str) -> str:
    default = ":443" if scheme == "https" else ":80"
    return netloc.lower().removesuffix(default)


def _shown(value: bytes | None) -> str:
    return (value or b"").decode("latin-1")[:200]


def _header(scope: Any, wanted: bytes) -> bytes | None:
    for name, value in scope["headers"]:
        if name == wanted:
            return bytes(value)
    return None


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
    """The query string without `api_key` and `ticket`, otherwise byte for byte."""
    if not _may_have_credentials(query):
        return query
    return b"&".join(_others(query.split(b"&")))


def _others(pairs: Iterable[bytes]) -> Iterable[bytes]:
    for pair in pairs:
        name = unquote_to_bytes(pair.partition(b"=")[0].replace(b"+", b" "))
        if name not in _IN_QUERY:
            yield pair
