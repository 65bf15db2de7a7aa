"""Who may ask: the checks that come before any route.

A web page that a person has open can send requests to loopback, and by rebinding its name to 127.0.0.1 can even read
the answers. So `Host` must be a name that is known to be ours, and what changes something or opens a WebSocket must not
come from another origin. The list of networks and the API key belong here too, before and after these checks.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from volant.model import Problem

from ._doors import ApiSettings

_SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
_REMEMBERED = 256


class Access:
    """The checks, for one configuration."""

    def __init__(self, settings: ApiSettings) -> None:
        self._hosts = {name.lower() for name in settings.allowed_hosts}
        self._hosts |= {urlsplit(address).netloc.lower() for address in settings.addresses if "://" in address}
        self._origins = {origin.lower().rstrip("/") for origin in settings.cors_origins}
        self._known: dict[tuple[bytes | None, object], bool] = {}

    def check(self, scope: Any) -> None:
        """:raises Problem: 421 or 403."""
        host: bytes | None = None
        origin: bytes | None = None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value
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
                hint="names besides loopback and the listen address go into VOLANT_ALLOWED_HOSTS",
            )
        if origin is not None and (scope["type"] == "websocket" or scope["method"] not in _SAFE):
            self._check_origin(_shown(origin), _shown(host))

    def _is_ours(self, host: bytes | None, local: object) -> bool:
        if not host:
            return False
        try:
            text = host.decode("ascii").lower()
            name = urlsplit(f"//{text}").hostname
            _ = urlsplit(f"//{text}").port
        except (UnicodeDecodeError, ValueError):
            return False
        if not name or "@" in text or "/" in text:
            return False
        if name == "localhost" or text in self._hosts or name in self._hosts:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        # An address can't be rebound. The one that the client has connected to is ours, which a socket for both
        # families shows as ::ffff:192.0.2.1.
        return address.is_loopback or str(local).removeprefix("::ffff:") == str(address)

    def _check_origin(self, origin: str, host: str) -> None:
        if origin.lower().rstrip("/") in self._origins:
            return
        # `host` is one of ours by now. A page of ours is one whose origin is what it talks to.
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
                hint="origins that may go into VOLANT_CORS_ORIGINS",
            )


def _netloc(netloc: str, scheme: str) -> str:
    default = ":443" if scheme == "https" else ":80"
    return netloc.lower().removesuffix(default)


def _shown(value: bytes | None) -> str:
    return (value or b"").decode("latin-1")[:200]


def without_credentials(query: bytes) -> bytes:
    """The query string without `api_key` and `ticket`, otherwise byte for byte."""
    if b"api" not in query and b"ticket" not in query and b"%" not in query:
        return query
    return b"&".join(_others(query.split(b"&")))


def _others(pairs: Iterable[bytes]) -> Iterable[bytes]:
    for pair in pairs:
        name = unquote_to_bytes(pair.partition(b"=")[0].replace(b"+", b" "))
        if name not in (b"api_key", b"ticket"):
            yield pair
