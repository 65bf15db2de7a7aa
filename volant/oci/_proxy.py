"""The proxy of the daemon through which skopeo reaches the network during one fetch, with a check of each address.

A registry may redirect to any address, and name any token service. skopeo follows, from inside this host's network. So
the proxy resolves each host, checks its addresses and connects to a checked one, which also defeats DNS rebinding. The
sandbox blocks all other ports for skopeo. TLS is skopeo's; the proxy only passes bytes on.

Programs in Go use no proxy for loopback. So the sandbox also allows the ports of registries there that the operator has
named or the caller may use.
"""

from __future__ import annotations

import base64
import ipaddress
import re
import secrets
import ssl
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol
from urllib.parse import unquote, urlsplit
from urllib.request import proxy_bypass

import msgspec
import trio

from volant.concurrency import open_helpers
from volant.model.heads import MAX_FIELDS, head_of

from ._errors import OciError
from ._reference import Reference

_CONNECTIONS = 32
"""Maximum concurrent connections. skopeo fetches six layers at a time."""
_HEAD_S = 30.0
"""Maximum time for the answer of an upstream proxy, which comes when it is connected."""
_MAX_HEAD = 32 * 1024
"""Maximum size of a head. Tokens of registries have some KiB."""
_LOOK_UP_S = 10.0
_CONNECT_S = 5.0
"""Maximum time for the connection to each address of a host."""
_LINGER_S = 1.0
_PIECE = 256 * 1024
_PORTS = {"http": 80, "https": 443}
_LINE = re.compile(r"([A-Z]{3,8}) ([!-~]+) HTTP/1\.[01]\Z")
_CONNECTED = re.compile(r"HTTP/1\.[01] 2")
_OF_A_CONNECTION = frozenset({"connection", "keep-alive", "proxy-connection", "proxy-authorization"})
_LOST = (trio.BrokenResourceError, trio.ClosedResourceError, OSError)

_Fields = Sequence[tuple[str, str]]


class Resolve(Protocol):
    """Looks hosts up."""

    async def __call__(self, host: str, port: int, *, must_exist: bool) -> list[str]:
        """Returns the allowed addresses of a host.

        :raises OciError: one is not allowed, or there is none and `must_exist` :raises OSError: there is no answer
        """


async def resolve_anywhere(host: str, port: int, *, must_exist: bool) -> list[str]:
    """Resolves any host like `Resolve`, for users who fetch with their own rights. :raises OSError: there is none, or
    no answer."""
    del must_exist
    try:
        found = await trio.socket.getaddrinfo(host, port, type=trio.socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"{host[:100]} is no name of a host") from error
    return [str(address[0]) for *_, address in found]


class _Mirror(msgspec.Struct):
    location: str = ""
    insecure: bool = False


class _Registry(_Mirror):
    prefix: str = ""
    mirror: list[_Mirror] = []


class _RegistriesConf(msgspec.Struct):
    """The relevant part of containers-registries.conf(5)."""

    registry: list[_Registry] = []


class _Head(NamedTuple):
    line: str
    fields: _Fields
    rest: bytes
    """The data that has arrived after the head."""

    def field(self, name: str) -> str:
        return next((value for each, value in self.fields if each.lower() == name), "")


class _Refused(Exception):
    """A refused request. The text is the status of the answer to skopeo."""


class FetchProxy:
    """A proxy for one fetch, from `open_proxy`."""

    def __init__(
        self,
        reference: Reference,
        plain_http: frozenset[str],
        mirrors: Mapping[str, bool],
        resolve: Resolve,
        environment: Mapping[str, str],
        port: int,
    ) -> None:
        self._reference = reference
        self._named = {*mirrors, *({reference.registry} & plain_http)}
        """The hosts, including ports, from which the operator allows this image to come, whatever their addresses."""
        self._plain_http = {*plain_http, *(name for name, is_plain in mirrors.items() if is_plain)}
        self._plain_hosts = {_split(f"//{each}")[0] for each in self._plain_http}
        self._resolve = resolve
        self._environment = environment
        self._port = port
        self.ports = {port}
        """The ports to which skopeo must connect directly: the proxy's, and those of registries on loopback."""
        self._user = f"volant:{secrets.token_hex(16)}"
        self._open = 0
        self._refused: OciError | None = None
        self._unreachable: OciError | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables that lead skopeo to this proxy."""
        here = f"http://{self._user}@127.0.0.1:{self._port}"
        return {"HTTP_PROXY": here, "HTTPS_PROXY": here}

    @property
    def failure(self) -> OciError | None:
        """The error that kept skopeo from a host; None if there was none."""
        return self._refused or self._unreachable

    async def open_ports(self) -> None:
        """Opens the ports of registries on loopback. :raises OciError: the image's registry is not allowed."""
        registry = self._reference.registry
        for name in {registry, *self._named, *self._plain_http}:
            host, given = _split(f"//{name}")
            if not _is_loopback(host):
                continue
            ports = tuple(_PORTS.values()) if given is None else (given,)
            try:
                if name not in self._named:
                    await self._resolve(host, ports[0], must_exist=False)
            except OciError:
                if name == registry:
                    raise
            except OSError:
                pass
            else:
                self.ports.update(ports)

    async def serve(self, stream: trio.SocketStream) -> None:
        """Answers a connection. Never raises because of a peer."""
        self._open += 1
        try:
            async with stream:
                with suppress(*_LOST):
                    await self._answer(stream)
        finally:
            self._open -= 1

    async def _answer(self, stream: trio.SocketStream) -> None:
        try:
            head = await _read_head(stream)
            if self._open > _CONNECTIONS:
                raise _Refused("503 Service Unavailable")
            found = _LINE.match(head.line)
            word = f"Basic {_base64(self._user)}"
            if found is None:
                raise _Refused("400 Bad Request")
            if not secrets.compare_digest(head.field("proxy-authorization").encode(), word.encode()):
                raise _Refused("407 Proxy Authentication Required")
            if found[1] == "CONNECT":
                await self._tunnel(stream, found[2], head)
            else:
                await self._forward(stream, found[1], found[2], head)
        except _Refused as refused:
            text = f"HTTP/1.1 {refused}\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"
            with trio.move_on_after(_LINGER_S):
                await stream.send_all(text.encode())
                await stream.send_eof()
                # To close a connection that has bytes left resets it, and the answer is lost.
                while await stream.receive_some(_PIECE):
                    pass

    async def _tunnel(self, stream: trio.SocketStream, target: str, head: _Head) -> None:
        host, port = _split(f"//{target}")
        if not host or port is None:
            raise _Refused("400 Bad Request")
        server, given = await self._connect(host, port, "https")
        async with server:
            begin = b""
            if given is not None:
                name = _joined(host, port)
                await server.send_all(_encoded(f"CONNECT {name} HTTP/1.1", [("Host", name), *given]))
                try:
                    answer = await _read_head(server)
                except trio.BrokenResourceError:
                    raise self._failed("this host's proxy does not answer") from None
                if not _CONNECTED.match(answer.line):
                    raise self._failed(f"this host's proxy does not connect to {host}: {answer.line[9:12]}")
                begin = answer.rest
            self._unreachable = None
            await stream.send_all(b"HTTP/1.1 200 OK\r\n\r\n" + begin)
            await server.send_all(head.rest)
            await _relay(stream, server, None)

    async def _forward(self, stream: trio.SocketStream, method: str, target: str, head: _Head) -> None:
        """Passes on an unencrypted request. The connection ends with its answer, as the next request may be for another
        host."""
        host, port = _split(target)
        length = head.field("content-length") or "0"
        if not host or not target.startswith("http://") or not re.fullmatch("[0-9]{1,9}", length):
            raise _Refused("400 Bad Request")
        has_secret = head.field("authorization") or method not in ("GET", "HEAD")
        leads = not self._plain_http.isdisjoint({self._reference.registry, *self._named})
        if host not in self._plain_hosts and (has_secret or not leads):
            # Anybody on the way can read it, and can have named that host.
            raise self._failed(f"it leads to {host[:100]} without HTTPS")
        port = port or _PORTS["http"]
        path = "/" + target.removeprefix("http://").partition("/")[2]
        server, given = await self._connect(host, port, "http")
        async with server:
            self._unreachable = None
            fields = [each for each in head.fields if each[0].lower() not in _OF_A_CONNECTION]
            line = f"{method} {'' if given is None else f'http://{_joined(host, port)}'}{path} HTTP/1.1"
            begin = _encoded(line, [*fields, *(given or ()), ("Connection", "close")])
            await server.send_all(begin + head.rest[: int(length)])
            await _relay(stream, server, max(0, int(length) - len(head.rest)))

    async def _connect(self, host: str, port: int, scheme: str) -> tuple[trio.abc.Stream, _Fields | None]:
        """Connects to a host, or to the operator's proxy for it. Returns the connection, and the fields that the proxy
        requires in a head, None for a host.

        :raises _Refused: it failed.
        """
        proxy = proxy_for(f"{scheme}://{_joined(host, port)}", self._environment)
        if proxy is None:
            return await self._open_stream(host, port, await self._addresses(host, port)), None
        # It connects where it is asked to, and may know names that this host does not.
        await self._addresses(host, port, must_exist=False)
        parts, (at, given) = urlsplit(proxy), _split(proxy)
        if parts.scheme not in _PORTS:
            raise self._failed(f"this host's proxy is not for HTTP: {parts.scheme}")
        try:
            addresses = await resolve_anywhere(at, 0, must_exist=True)
        except OSError:
            raise self._failed(f"this host's proxy {at} has no address") from None
        stream: trio.abc.Stream = await self._open_stream(at, given or _PORTS[parts.scheme], addresses)
        if parts.scheme == "https":
            context = ssl.create_default_context()
            stream = trio.SSLStream(stream, context, server_hostname=at, https_compatible=True)
        user = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else None
        return stream, [] if user is None else [("Proxy-Authorization", f"Basic {_base64(user)}")]

    async def _addresses(self, host: str, port: int, *, must_exist: bool = True) -> list[str]:
        """Returns the allowed addresses of a host. :raises _Refused: there are none."""
        names = {_joined(host, port), *([_joined(host, None)] if port in _PORTS.values() else [])}
        resolve = self._resolve if names.isdisjoint(self._named) else resolve_anywhere
        with trio.move_on_after(_LOOK_UP_S):
            try:
                return await resolve(host, port, must_exist=must_exist)
            except OciError as error:
                self._refused = error
                raise _Refused("403 Forbidden") from error
            except OSError:
                pass
        if must_exist:
            raise self._failed(f"{host[:100]} has no address that can be looked up now")
        return []

    async def _open_stream(self, host: str, port: int, addresses: Sequence[str]) -> trio.SocketStream:
        """Connects to one of some addresses. :raises _Refused: it failed."""
        why = "it does not answer"
        for address in addresses:
            with trio.move_on_after(_CONNECT_S):
                try:
                    return await trio.open_tcp_stream(address, port)
                except OSError as error:
                    why = str(error.__cause__ or error)
        raise self._failed(f"{_joined(host, port)[:100]} can't be reached: {why}")

    def _failed(self, why: str) -> _Refused:
        self._unreachable = OciError(
            "registry_unreachable", f"{self._reference} can't be fetched: {why}",
            "check the name of the registry and this host's network",
        )  # fmt: skip
        return _Refused("502 Bad Gateway")


@asynccontextmanager
async def open_proxy(
    reference: Reference, plain_http: frozenset[str], resolve: Resolve, environment: Mapping[str, str]
) -> AsyncIterator[FetchProxy]:
    """Opens the proxy for the fetch of an image, for the block.

    :param plain_http: registries without TLS. The image's registry may then have any address
    :param environment: the environment variables with the operator's proxies
    :raises OciError: the registry is on loopback, and not allowed :raises OSError: there is no port
    """
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1", backlog=_CONNECTIONS)
    port = listeners[0].socket.getsockname()[1]
    mirrors = await trio.to_thread.run_sync(mirrors_of, reference.name)
    found = FetchProxy(reference, plain_http, mirrors, resolve, environment, port)
    async with open_helpers() as nursery:
        await nursery.start(trio.serve_listeners, found.serve, listeners)
        await found.open_ports()
        yield found


def mirrors_of(name: str, directory: Path = Path("/etc/containers")) -> dict[str, bool]:
    """Returns the mirrors in containers-registries.conf(5) of an image's registry, with their ports, and whether they
    need no TLS. Blocks."""
    found: dict[str, bool] = {}
    for path in (directory / "registries.conf", *sorted(directory.glob("registries.conf.d/*.conf"))):
        with suppress(OSError, ValueError):
            settings = msgspec.toml.decode(path.read_bytes(), type=_RegistriesConf)
            for registry in settings.registry:
                if _has_prefix(name, registry.prefix or registry.location):
                    for each in (registry, *registry.mirror):
                        host = each.location.partition("/")[0]
                        found[host] = found.get(host, False) or each.insecure
    found.pop("", None)
    return found


def _has_prefix(name: str, prefix: str) -> bool:
    """Returns whether an entry applies to an image: its prefix is a registry, a part of an image's path, or
    `*.domain`."""
    if prefix.startswith("*."):
        return name.partition("/")[0].endswith(prefix[1:])
    return bool(prefix) and f"{name}/".startswith(f"{prefix}/")


def proxy_for(url: str, environment: Mapping[str, str]) -> str | None:
    """Returns the operator's proxy for an address, as a URL; None if there is none.

    :param environment: the environment variables with proxies, in upper or lower case
    """
    proxies = {
        name.lower().removesuffix("_proxy"): value
        for name, value in environment.items()
        if name.lower().endswith("_proxy") and value
    }
    parts = urlsplit(url)
    proxy = proxies.get(parts.scheme)
    if proxy is None or proxy_bypass(parts.netloc, proxies):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


async def _relay(client: trio.abc.Stream, server: trio.abc.Stream, length: int | None) -> None:
    """Passes bytes on until one side has no more. `length` is the number of bytes that the client may still send; None
    for no limit."""
    async with open_helpers() as nursery:

        async def upwards() -> None:
            left = length
            with suppress(*_LOST):
                while piece := await client.receive_some(_PIECE):
                    if left is not None:
                        left -= len(piece)
                        if left < 0:
                            break
                    await server.send_all(piece)
            nursery.cancel_scope.cancel()

        nursery.start_soon(upwards)
        while piece := await server.receive_some(_PIECE):
            await client.send_all(piece)


async def _read_head(stream: trio.abc.Stream) -> _Head:
    """Reads a head. :raises _Refused: it is malformed, or too large. :raises trio.BrokenResourceError: it does not
    arrive."""
    received = bytearray()
    with trio.move_on_after(_HEAD_S):
        while True:
            count, end = head_of(received)
            if count > MAX_FIELDS or (end or len(received)) > _MAX_HEAD:
                raise _Refused("431 Request Header Fields Too Large")
            if end is not None:
                line, *lines = bytes(received[:end]).decode("latin-1").split("\n")
                parts = [each.partition(":") for each in lines]
                fields = [(name, value.strip()) for name, colon, value in parts if colon]
                return _Head(line.rstrip("\r"), fields, bytes(received[end:]))
            piece = await stream.receive_some(16384)
            if not piece:
                break
            received += piece
    raise trio.BrokenResourceError("no head has arrived")


def _encoded(line: str, fields: _Fields) -> bytes:
    return "\r\n".join([line, *(f"{name}: {value}" for name, value in fields), "\r\n"]).encode("latin-1")


def _split(url: str) -> tuple[str, int | None]:
    """Returns host and port of a URL; an empty host if it is malformed."""
    try:
        parts = urlsplit(url)
        return parts.hostname or "", parts.port
    except ValueError:
        return "", None


def _joined(host: str, port: int | None) -> str:
    name = f"[{host}]" if ":" in host else host
    return name if port is None else f"{name}:{port}"


def _base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


def _is_loopback(host: str) -> bool:
    """Returns whether programs in Go connect to a host without a proxy."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
