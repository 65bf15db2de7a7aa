"""A client of one repository of a registry, which reads and writes blobs and manifests with the OCI's distribution
protocol.

Images are fetched by skopeo. This client is for artifacts of many small blobs, most of which exist at the destination
already: it asks before it sends, sends blobs from memory, and keeps its connections. Only `volant.transfer` uses it.

Answers of a registry are not trusted. A redirect or the address of a token service may lead anywhere, so each
connection goes to an address that `resolve` has allowed, credentials go only to the registry and its token service, and
all answers are bounded.
"""

from __future__ import annotations

import math
import re
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar
from urllib.parse import quote, unquote, urlencode, urljoin, urlsplit

import httpcore
import msgspec
import trio

from volant.concurrency import Backoff

from ._credentials import Credentials, find_credentials
from ._errors import OciError
from ._manifest import MAX_DOCUMENT_BYTES, digest_of
from ._proxy import Resolve, proxy_for
from ._reference import DEFAULT_REGISTRY, Reference

T = TypeVar("T")
Spend = Callable[[int], Awaitable[None]]
"""Waits until this number of bytes may be sent or received."""

CERTIFICATES = (Path("/etc/containers/certs.d"), Path("/etc/docker/certs.d"))
_TRIES = 4
_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_MOST_RETRY_AFTER_S = 60.0
_CONNECT_S = 15.0
_CONNECTIONS = 10
_IDLE_S = 30.0
_REDIRECTS = 5
_PIECE = 64 * 1024
_LEAST_BYTES_PER_S = 4096
"""The minimum rate of a registry; slower requests end. Read timeouts restart with each byte, so they bound nothing."""
_MAX_ANSWER = 64 * 1024
"""Maximum size of an answer that is no document: an error, a token."""
_MAX_SAID = 200
_BUSY, _TRANSIENT = 429, frozenset({408, 429, 500, 502, 503, 504})
_CONTROL = re.compile(r"[^\x20-\x7e]+")
_PARAMETER = re.compile(r'([a-zA-Z]{1,32})="((?:[^"\\]|\\.)*)"')
_TOKEN = re.compile(r"[!-~]{1,16384}\Z")
_ACCEPT = "application/vnd.oci.image.manifest.v1+json"


class RegistryAccess(msgspec.Struct, frozen=True, kw_only=True):
    """The settings for this host's access to registries."""

    plain_http: frozenset[str] = frozenset()
    """Registries that may be used without TLS, including their ports."""
    certificates: Path | None = None
    """A directory of CA certificates for all registries; None for the registry's own directory in `CERTIFICATES`."""
    environment: Mapping[str, str] = {}
    """Environment variables for proxies."""
    stalled_s: float = 60.0
    """A request ends if nothing arrives for this time, or too little for twice this time."""


class _Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class _Again(Exception):
    """A failure of a request that may be temporary."""

    def __init__(self, error: OciError, after_s: float = 0.0) -> None:
        super().__init__(str(error))
        self.error = error
        self.after_s = after_s


@asynccontextmanager
async def open_repository(
    reference: Reference,
    access: RegistryAccess,
    *,
    auth: bytes | None,
    actions: Literal["pull", "pull,push"],
    resolve: Resolve,
    spend: Spend,
) -> AsyncIterator[Repository]:
    """Opens the repository of a reference for the block. Nothing is sent yet.

    :param auth: the content of an auth file
    """
    repository = Repository(reference, access, auth, actions, resolve, spend)
    try:
        yield repository
    finally:
        await repository.aclose()


class Repository:
    """One repository, from `open_repository`. All methods raise OciError, with codes of `docs/explanation/oci.md`."""

    def __init__(
        self,
        reference: Reference,
        access: RegistryAccess,
        auth: bytes | None,
        actions: str,
        resolve: Resolve,
        spend: Spend,
    ) -> None:
        registry, _, self._name = reference.name.partition("/")
        self._shown = str(reference)
        # As Docker does.
        host = f"registry-1.{registry}" if registry == DEFAULT_REGISTRY else registry
        self._plain = registry in access.plain_http
        self._origin = f"{'http' if self._plain else 'https'}://{host}"
        self._scope = f"repository:{self._name}:{actions}"
        self._credentials = Credentials() if auth is None else find_credentials(auth, reference.name)
        self._access = access
        self._spend = spend
        self._resolve = resolve
        self._backend = _Network(resolve)
        self._tls = _trust(registry, access.certificates)
        self._pools: dict[str | None, httpcore.AsyncConnectionPool] = {}
        self._authorization = ""
        self._authorizing = trio.Lock()

    async def aclose(self) -> None:
        """Closes all connections."""
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
            for pool in self._pools.values():
                await pool.aclose()

    async def manifest(self, name: str) -> bytes:
        """Returns the manifest with a tag or a digest."""

        async def get() -> bytes:
            answer = await self._request(
                "GET", f"manifests/{name}", {"Accept": _ACCEPT}, limit=MAX_DOCUMENT_BYTES, expects={200}
            )
            if name.startswith("sha256:") and digest_of(answer.body) != name:
                raise self._mismatch("the manifest", name)
            return answer.body

        return await self._try(get)

    async def put_manifest(self, name: str, data: bytes, media_type: str) -> None:
        """Stores a manifest under a tag, after all its blobs."""

        async def put() -> None:
            await self._request("PUT", f"manifests/{name}", {"Content-Type": media_type}, data, expects={201, 200})

        await self._try(put)

    async def has_blob(self, digest: str) -> bool:
        """Returns whether the repository has a blob."""

        async def head() -> bool:
            return (await self._request("HEAD", f"blobs/{digest}", expects={200, 404})).status == 200

        return await self._try(head)

    async def blob(self, digest: str, size: int) -> bytes:
        """Returns a blob after a check of its digest. `size` is the size in its manifest."""

        async def get() -> bytes:
            answer = await self._request("GET", f"blobs/{digest}", limit=size, expects={200}, is_blob=True)
            if len(answer.body) != size or digest_of(answer.body) != digest:
                raise self._mismatch("a blob", digest)
            return answer.body

        return await self._try(get)

    async def put_blob(self, digest: str, data: bytes) -> None:
        """Stores a blob."""

        async def put() -> None:
            begun = await self._request("POST", "blobs/uploads/", body=b"", expects={202})
            place = self._location(f"{self._origin}/v2/{self._name}/blobs/uploads/", begun)
            place += f"{'&' if urlsplit(place).query else '?'}digest={quote(digest)}"
            headers = {"Content-Type": "application/octet-stream"}
            await self._request("PUT", place, headers, data, expects={201, 204}, is_blob=True)

        await self._try(put)

    # Requests

    async def _try(self, work: Callable[[], Awaitable[T]]) -> T:
        """Repeats an action after temporary failures. :raises OciError: it failed."""
        pauses = Backoff(_PAUSE_S, _LONGEST_PAUSE_S)
        for left in reversed(range(_TRIES)):
            try:
                return await work()
            except _Again as again:
                if not left:
                    raise again.error from again.__cause__
                await trio.sleep(again.after_s)
            await pauses.pause()
        raise AssertionError("unreachable")

    async def _request(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        *,
        expects: Iterable[int],
        limit: int = _MAX_ANSWER,
        is_blob: bool = False,
    ) -> _Answer:
        """Sends a request, with credentials if the registry requires them. `path` is a path in the repository, or a
        URL.

        :raises OciError: it failed. :raises _Again: it may succeed later.
        """
        url = path if "://" in path else f"{self._origin}/v2/{self._name}/{path}"
        used = self._authorization
        answer = await self._follow(method, url, dict(headers or {}), body, limit, is_blob)
        if answer.status == 401:
            await self._authorize(answer.headers.get("www-authenticate", ""), used)
            answer = await self._follow(method, url, dict(headers or {}), body, limit, is_blob)
        if answer.status in expects:
            return answer
        raise self._failure(answer)

    async def _follow(
        self, method: str, url: str, headers: dict[str, str], body: bytes | None, limit: int, is_blob: bool
    ) -> _Answer:
        for _ in range(_REDIRECTS):
            own = self._is_own(url)
            sent = {**headers, "Authorization": self._authorization} if own and self._authorization else headers
            answer = await self._send(method, url, sent, body, limit, is_blob)
            if answer.status == 401 and not own:
                # Only the registry may name the token service, which gets the credentials.
                raise self._unauthorized()
            if answer.status not in (301, 302, 303, 307, 308) or method not in ("GET", "HEAD"):
                return answer
            url = self._location(url, answer)
        raise self._unreachable("it redirects again and again")

    def _location(self, url: str, answer: _Answer) -> str:
        """Returns the location in the answer of `url`. :raises OciError: it is not a URL."""
        try:
            return urljoin(url, answer.headers.get("location", ""))
        except ValueError as error:
            raise self._unreachable(f"it leads to something that is no URL: {_cut(str(error))}") from error

    async def _send(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes | None, limit: int, is_blob: bool
    ) -> _Answer:
        """Sends one request to an address. :raises OciError: it failed. :raises _Again: it may succeed later."""
        if not url.isascii() or not url.startswith(("https://", "http://") if self._plain else ("https://",)):
            raise self._unreachable("it leads to something that is not HTTPS")
        stalled_s = self._access.stalled_s
        timeouts = {"connect": min(_CONNECT_S, stalled_s), "read": stalled_s, "write": stalled_s}
        scope = trio.CancelScope(deadline=trio.current_time() + 2 * stalled_s)
        lines = {"User-Agent": "volant", "Accept-Encoding": "identity", **headers}
        if body is not None:
            lines["Content-Length"] = str(len(body))
        try:
            lines["Host"] = urlsplit(url).netloc.rpartition("@")[2]
            pool = await self._pool(url, timeouts["connect"])
            with scope:
                async with (
                    # A connection that breaks leaves the rest of them.
                    aclosing(self._pieces(body or b"", scope, is_blob)) as pieces,
                    pool.stream(
                        method,
                        url,
                        headers=list(lines.items()),
                        content=None if body is None else pieces,
                        extensions={"timeout": timeouts},
                    ) as response,
                ):
                    received = bytearray()
                    async for piece in response.aiter_stream():
                        received += piece
                        if len(received) > max(limit, _MAX_ANSWER):
                            raise OciError(
                                "image_invalid",
                                f"{self._shown}: the registry sends more than {limit} bytes for {method}",
                                "push the image again, or ask the registry's operator",
                            )
                        await self._moved(len(piece), scope, is_blob)
                    return _Answer(response.status, _headers(response.headers), bytes(received))
            raise httpcore.TimeoutException
        except httpcore.TimeoutException as error:
            stalled = OciError(
                "fetch_stalled", f"{self._shown}: nothing has moved for {stalled_s:g} s, or too little",
                "try again; check the registry and this host's network",
            )  # fmt: skip
            raise _Again(stalled) from error
        except httpcore.ConnectError as error:
            unreachable = self._unreachable(str(error) or "no connection")
            if "CERTIFICATE" in str(error).upper():
                raise unreachable from error
            raise _Again(unreachable) from error
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.ProxyError) as error:
            interrupted = OciError(
                "fetch_interrupted", f"{self._shown}: the connection to the registry broke: {_cut(str(error))}",
                "try again: data that has arrived is not sent again",
            )  # fmt: skip
            raise _Again(interrupted) from error
        except (httpcore.UnsupportedProtocol, ValueError, OSError) as error:
            raise self._unreachable(_cut(str(error))) from error

    async def _pieces(self, body: bytes, scope: trio.CancelScope, is_blob: bool) -> AsyncGenerator[bytes, None]:
        for at in range(0, len(body), _PIECE):
            piece = body[at : at + _PIECE]
            await self._moved(len(piece), scope, is_blob)
            yield piece

    async def _moved(self, count: int, scope: trio.CancelScope, is_blob: bool) -> None:
        """Waits for the bandwidth for some bytes of a blob. Extends the deadline of their request by that wait, and by
        the time that a slow registry may take for them."""
        deadline, since = scope.deadline, trio.current_time()
        scope.deadline = math.inf
        if is_blob:
            await self._spend(count)
        scope.deadline = deadline + trio.current_time() - since + count / _LEAST_BYTES_PER_S

    async def _pool(self, url: str, timeout_s: float) -> httpcore.AsyncConnectionPool:
        proxy = proxy_for(url, self._access.environment)
        if proxy is not None:
            # It connects where it is asked to, and may know names that this host does not.
            target = urlsplit(f"//{unquote(urlsplit(url).netloc)}")
            with suppress(OSError), trio.move_on_after(timeout_s):
                await self._resolve(target.hostname or "", target.port or 0, must_exist=False)
        if proxy not in self._pools:
            options: dict[str, Any] = {
                "ssl_context": self._tls,
                "max_connections": _CONNECTIONS,
                "keepalive_expiry": _IDLE_S,
            }
            if proxy is None:
                self._pools[proxy] = httpcore.AsyncConnectionPool(network_backend=self._backend, **options)
            else:
                found = urlsplit(proxy)
                user = (unquote(found.username), unquote(found.password or "")) if found.username else None
                self._pools[proxy] = httpcore.AsyncHTTPProxy(proxy, proxy_auth=user, **options)
        return self._pools[proxy]

    def _is_own(self, url: str) -> bool:
        return urlsplit(url)[:2] == urlsplit(self._origin)[:2]

    # Credentials

    async def _authorize(self, challenge: str, used: str) -> None:
        """Gets the authorization that a registry requires. `used` are the credentials that it has just refused. :raises
        OciError: it failed."""
        async with self._authorizing:
            if self._authorization != used:
                return  # another request has got new ones
            scheme, _, rest = challenge.partition(" ")
            parameters = {name.lower(): value for name, value in _PARAMETER.findall(rest)}
            if scheme.lower() == "basic" and self._credentials.basic and not used:
                self._authorization = f"Basic {self._credentials.basic}"
            elif scheme.lower() == "bearer" and parameters.get("realm"):
                self._authorization = f"Bearer {await self._token(parameters)}"
            else:
                raise self._unauthorized()

    async def _token(self, parameters: Mapping[str, str]) -> str:
        """Returns a token of the registry's token service."""
        asked = {"scope": self._scope}
        if parameters.get("service"):
            asked["service"] = parameters["service"]
        method, url, headers, body = "GET", parameters["realm"], {}, None
        if urlsplit(url).scheme == "http" and urlsplit(url).hostname != urlsplit(self._origin).hostname:
            # A registry without TLS may be anybody on the way, who must not choose who gets the credentials.
            raise self._unreachable("its token service is another host, without HTTPS")
        if self._credentials.identity_token:
            method, headers = "POST", {"Content-Type": "application/x-www-form-urlencoded"}
            form = {"grant_type": "refresh_token", "client_id": "volant"}
            body = urlencode({**asked, **form, "refresh_token": self._credentials.identity_token}).encode()
        else:
            url += f"{'&' if '?' in url else '?'}{urlencode(asked)}"
            if self._credentials.basic:
                headers = {"Authorization": f"Basic {self._credentials.basic}"}
        answer = await self._send(method, url, headers, body, _MAX_ANSWER, is_blob=False)
        if answer.status != 200:
            raise self._failure(answer)
        try:
            found = msgspec.json.decode(answer.body, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            found = {}
        token = found.get("token") or found.get("access_token")
        if not isinstance(token, str) or not _TOKEN.match(token):
            raise self._unauthorized()
        return token

    # Errors

    def _failure(self, answer: _Answer) -> Exception:
        """Returns the error for an unexpected answer."""
        said = f": {text}" if (text := _said(answer.body)) else ""
        what = f"{self._shown}: the registry answers with {answer.status}{said}"
        if answer.status in (401, 403):
            return self._unauthorized(said)
        if answer.status == _BUSY:
            hint = "wait a while, or give credentials: registries allow more requests with them"
            return _Again(OciError("registry_busy", what, hint), _retry_after(answer))
        if answer.status in _TRANSIENT:
            return _Again(OciError("registry_unreachable", what, "try again later"), _retry_after(answer))
        if answer.status == 404:
            return OciError("image_not_found", what, "check name and tag")
        return OciError("registry_refused", what, "see what the registry says; it may not take such artifacts")

    def _unauthorized(self, said: str = "") -> OciError:
        return OciError(
            "image_unauthorized", f"{self._shown}: the registry wants other credentials{said}",
            "give credentials that may use it, as `docker login` and `skopeo login` store them; check the name",
        )  # fmt: skip

    def _unreachable(self, why: str) -> OciError:
        return OciError(
            "registry_unreachable", f"{self._shown}: the registry can't be reached: {why}",
            "check the name of the registry, its certificate and this host's network",
        )  # fmt: skip

    def _mismatch(self, what: str, digest: str) -> OciError:
        return OciError(
            "image_mismatch", f"{self._shown}: {what} has other content than its digest {digest} says",
            "try again; if it stays, the registry has a damaged copy",
        )  # fmt: skip


class _Network(httpcore.AsyncNetworkBackend):
    """Connects only to checked addresses."""

    def __init__(self, resolve: Resolve) -> None:
        self._resolve = resolve
        self._inner = httpcore.TrioBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        with trio.move_on_after(float("inf") if timeout is None else timeout):
            for address in await self._resolve(host, port, must_exist=True):
                try:
                    return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
                except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                    failure = error
            raise failure
        raise httpcore.ConnectTimeout(f"{host} does not answer")

    async def sleep(self, seconds: float) -> None:
        await trio.sleep(seconds)


def _trust(registry: str, directory: Path | None) -> ssl.SSLContext:
    """Returns a context that trusts this host's authorities and those that the operator adds."""
    context = ssl.create_default_context()
    places = [place / registry for place in CERTIFICATES] if directory is None else [directory]
    for place in places:
        for path in sorted(place.glob("*.crt")):
            try:
                context.load_verify_locations(path)
            except (OSError, ssl.SSLError) as error:
                raise OciError(
                    "registry_unreachable", f"the certificates in {path} can't be read: {error}", "correct the file"
                ) from error
    return context


def _headers(lines: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in lines}


def _retry_after(answer: _Answer) -> float:
    text = answer.headers.get("retry-after", "")
    return min(float(text), _MOST_RETRY_AFTER_S) if text.isascii() and text.isdecimal() and len(text) < 10 else 0.0


def _said(body: bytes) -> str:
    """Returns the registry's error message, which is not trusted."""
    try:
        error = msgspec.json.decode(body, type=dict[str, Any])["errors"][0]
        text = f"{error.get('code', '')} {error.get('message', '')}"
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, LookupError, TypeError, AttributeError):
        return ""
    return _cut(text)


def _cut(text: str) -> str:
    plain = _CONTROL.sub(" ", text).strip()
    return plain if len(plain) <= _MAX_SAID else f"{plain[:_MAX_SAID]}…"
