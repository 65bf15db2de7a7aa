"""Fetches the signing keys of an issuer, keeps them while it is down, and fetches them again when it uses a new one.

One task fetches. So the cancellation of a request does not interrupt a fetch that other requests wait for.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from volant.concurrency import Backoff
from volant.model import is_safe_url

if TYPE_CHECKING:
    from joserfc.jwk import ECKey, OKPKey, RSAKey

    SigningKey = RSAKey | ECKey | OKPKey

FETCH_S = 10.0
"""Deadline for one document, from the connection to the last byte."""
GAP_S = 10.0
"""Minimum time between two fetches, because any client can send tokens with unknown keys."""
REFRESH_S = 900.0
"""How long keys are used before they are fetched again, unless the issuer's `Cache-Control` says otherwise."""
_LEAST_REFRESH_S, _MOST_REFRESH_S = 60.0, 3600.0
KEEP_S = 86400.0
"""How long keys are used if they can't be fetched again."""
MAX_BYTES = 512 * 1024
"""Maximum size of a document."""
MAX_WAITING = 256
"""Maximum requests that wait for a fetch: any client can send one, and each occupies a connection in the meantime."""
_MAX_KEYS = 100
_LEAST_RSA_BITS = 2048
_TYPES = {"RSA", "EC", "OKP"}
_MAX_AGE = re.compile(r"\bmax-age=([0-9]{1,9})\b")

_logger = logging.getLogger("volant.identity")


class Document(msgspec.Struct, frozen=True):
    """An answer of an issuer."""

    content: bytes
    cache_control: str = ""


Fetch = Callable[[str], Awaitable[Document]]
"""Returns the document at a URL. Raises `IssuerError`."""


class Endpoints(msgspec.Struct, frozen=True):
    """The endpoints for signing in, from the issuer's own document (OpenID Connect Discovery, 3)."""

    authorization: str | None = None
    """None if users can't sign in with a browser."""
    token: str | None = None
    takes_basic: bool = True
    """Whether it accepts a client's secret as a password, and not only in the form."""
    names_itself: bool = False
    """Whether each of its answers has `iss` (RFC 9207)."""


class IssuerError(Exception):
    """An issuer does not answer, or its answer is invalid. The text names the problem and the URL."""


class IssuerKeys:
    """Holds the keys of one issuer."""

    def __init__(self, issuer: str, fetch: Fetch, changed: Callable[[], None]) -> None:
        """Creates it. `changed` is called when keys were added or removed."""
        self._issuer = issuer
        self._fetch = fetch
        self._changed = changed
        self._keys: Mapping[str, SigningKey] = {}
        self._raw: object = None
        self._endpoints: Endpoints | None = None
        self._tried_at = self._fetched_at = -KEEP_S
        self._wanted = trio.Event()
        self._tried = trio.Event()
        self._waiting = 0
        self.trouble: str | None = "its keys have not been fetched yet"
        """Why the last fetch failed; None if it succeeded."""

    def __bool__(self) -> bool:
        """Returns whether there are keys."""
        return bool(self._keys)

    def find(self, kid: str | None) -> SigningKey | None:
        """Returns the key with this id; without an id, the only key if there is one. None if there is no such key."""
        if kid is None:
            return next(iter(self._keys.values())) if len(self._keys) == 1 else None
        return self._keys.get(kid)

    async def fetch_if_unknown(self, kid: str | None) -> None:
        """Fetches the keys again if this one is unknown, at most once in `GAP_S`.

        :raises IssuerError: too many requests wait for the fetch.
        """
        if self.find(kid) is None:
            await self._fetch_now()

    async def discover(self) -> Endpoints:
        """Returns the endpoints for signing in; may take seconds.

        :raises IssuerError: the issuer does not report them, or too many requests wait for them.
        """
        if self._endpoints is None:
            await self._fetch_now()
        if self._endpoints is None:
            raise IssuerError(self.trouble or f"the issuer {self._issuer} does not answer")
        return self._endpoints

    async def _fetch_now(self) -> None:
        if trio.current_time() - self._tried_at < GAP_S:
            return
        if self._waiting >= MAX_WAITING:
            raise IssuerError(f"too many requests wait for the keys of {self._issuer}, which are being fetched")
        self._wanted.set()
        self._waiting += 1
        try:
            with trio.move_on_after(2 * FETCH_S):
                await self._tried.wait()
        finally:
            self._waiting -= 1

    async def keep(self) -> None:
        """Fetches the keys now and whenever they are due, until cancelled."""
        retry = Backoff(GAP_S, 60.0)
        while True:
            try:
                pause_s = await self._refresh()
                retry.reset()
            except IssuerError as error:
                if self.trouble != str(error):
                    _logger.warning("the keys of the issuer %s can't be fetched: %s", self._issuer, error)
                self.trouble = str(error)
                if self._keys and trio.current_time() - self._fetched_at > KEEP_S:
                    self._replace({}, None)
                pause_s = retry.next_s
            finally:
                self._tried_at = trio.current_time()
                self._tried.set()
                self._tried = trio.Event()
                # This fetch has served all requests that asked meanwhile.
                self._wanted = trio.Event()
            with trio.move_on_after(pause_s):
                await self._wanted.wait()
            self._wanted = trio.Event()

    async def _refresh(self) -> float:
        """Fetches the keys. Returns the seconds until the next fetch. :raises IssuerError: the answer is not valid."""
        url = self._issuer.rstrip("/") + "/.well-known/openid-configuration"
        discovered = _object(await self._fetch(url), url)
        if discovered.get("issuer") != self._issuer:
            # Otherwise one issuer could name its keys as those of another (OpenID Connect Discovery, 4.3).
            raise IssuerError(f"{url} belongs to the issuer {str(discovered.get('issuer'))[:200]!r}")
        self._endpoints = _endpoints(discovered)
        where = discovered.get("jwks_uri")
        if not isinstance(where, str) or not is_safe_url(where):
            raise IssuerError(f"{url} has no jwks_uri with https://")
        document = await self._fetch(where)
        raw = _object(document, where).get("keys")
        keys = _keys(raw)
        if not keys:
            raise IssuerError(f"{where} has no signing key that can be used")
        if self.trouble is not None:
            _logger.info("the issuer %s has %d keys", self._issuer, len(keys))
        self.trouble = None
        self._fetched_at = trio.current_time()
        if raw != self._raw:
            self._replace(keys, raw)
        age = _MAX_AGE.search(document.cache_control)
        return REFRESH_S if age is None else min(max(float(age[1]), _LEAST_REFRESH_S), _MOST_REFRESH_S)

    def _replace(self, keys: Mapping[str, SigningKey], raw: object) -> None:
        self._keys, self._raw = keys, raw
        self._changed()


def _object(document: Document, url: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(document.content, type=dict[str, Any])
    except (ValueError, RecursionError):
        raise IssuerError(f"{url} is not a JSON object") from None


def _endpoints(discovered: Mapping[str, Any]) -> Endpoints:
    def address(name: str) -> str | None:
        found = discovered.get(name)
        return found if isinstance(found, str) and is_safe_url(found) else None

    methods = discovered.get("token_endpoint_auth_methods_supported")
    return Endpoints(
        authorization=address("authorization_endpoint"),
        token=address("token_endpoint"),
        takes_basic=not isinstance(methods, list) or "client_secret_basic" in methods,
        names_itself=discovered.get("authorization_response_iss_parameter_supported") is True,
    )


def _keys(raw: object) -> dict[str, SigningKey]:
    """Returns the signing keys by their ids, without weak, invalid and unsupported ones."""
    from joserfc.jwk import RSAKey, import_key

    found: dict[str, Any] = {}
    for each in raw[:_MAX_KEYS] if isinstance(raw, list) else ():
        if not isinstance(each, dict) or each.get("use", "sig") != "sig":
            continue
        if not isinstance(each.get("kty"), str) or each["kty"] not in _TYPES:
            continue
        if "d" in each:  # A published private key: anybody can sign with it.
            continue
        try:
            key = import_key(each)
            if isinstance(key, RSAKey) and key.public_key.key_size < _LEAST_RSA_BITS:
                continue
        except Exception as error:  # The library may raise anything; the other keys can be used.
            _logger.debug("a key of the issuer can't be used: %r", error)
            continue
        kid = each.get("kid")
        found[kid if isinstance(kid, str) else f" {len(found)}"] = key
    return found
