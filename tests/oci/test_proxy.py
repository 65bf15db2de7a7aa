"""skopeo reaches what the caller may use and nothing else, wherever a registry sends it."""

from __future__ import annotations

import base64
import os
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import trio

from tests.certificates import Authority
from tests.oci.kit import BuiltImage, tar, write_layout
from tests.oci.registry import PASSWORD, FailingRegistry, auth_file, needs_registry
from tests.oci.test_confinement import USERS, needs_landlock, needs_root, place
from tests.oci.test_images import opened, refused
from tests.web_server import WebServer, answer
from volant.oci import Isolation, OciError, Reference, parse_reference
from volant.oci._proxy import FetchProxy, mirrors_of, open_proxy

__all__ = ["place"]

pytestmark = pytest.mark.programs

Request = BaseHTTPRequestHandler
PUBLIC, OTHER, INSIDE = "registry.test", "storage.test", "inside.test"


async def resolve(host: str, port: int, *, must_exist: bool) -> list[str]:
    """Hosts of the tests are here; one of them may not be used."""
    del port, must_exist
    if host in (PUBLIC, OTHER):
        return ["127.0.0.1"]
    raise OciError("registry_not_allowed", f"{host} has no public address", "allow it")


class Service(WebServer):
    """Anything of the host's network."""

    def __init__(self) -> None:
        super().__init__(protocol="HTTP/1.1")
        self.asked: list[tuple[str, str | None]] = []

    def get(self, request: Request) -> None:
        self.asked.append((request.path, request.headers.get("Authorization")))
        answer(request, 200, b'{"token":"t"}')

    def post(self, request: Request, body: bytes) -> None:
        self.asked.append((request.path, body.decode()))
        answer(request, 200, b"{}")


class Secure(FailingRegistry):
    """A registry with TLS, as `registry.test`."""

    def __init__(self, authority: Authority, layout: Path, fails: Callable[[Request], bool]) -> None:
        super().__init__(layout, fails)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority.issue(PUBLIC))
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.address = f"{PUBLIC}:{self.port}"


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as found:
        yield found


@pytest.fixture
def authority(place: Path) -> Authority:
    (place / "certificates").mkdir()
    found = Authority(place / "certificates")
    found.path.rename(found.path.with_suffix(".crt"))
    found.path.with_suffix(".crt").chmod(0o644)
    return found


@pytest.fixture
def image(place: Path) -> BuiltImage:
    return write_layout(place / "layout", [tar(("data", {"data": os.urandom(1000)}))])


@needs_root
@needs_landlock
@needs_registry
async def test_skopeo_fetches_with_tls_through_the_proxy(place: Path, authority: Authority, image: BuiltImage) -> None:
    isolation = Isolation(users=USERS, places=(place,))
    with Secure(authority, image.layout, lambda request: False) as server:
        options = {"certificates": place / "certificates", "registries": lambda is_admin: resolve}
        async with opened(place, isolation=isolation, skopeo=options) as images:
            found = await images.obtain(parse_reference(f"{server.address}/app:t"))
            assert found.digest == image.digest


@needs_root
@needs_landlock
@needs_registry
@pytest.mark.parametrize(
    ("where", "code"),
    [
        (f"https://{INSIDE}/secret", "registry_not_allowed"),
        (f"http://{INSIDE}/secret", "registry_unreachable"),
        (f"http://{OTHER}:PORT/secret", "registry_unreachable"),
        # skopeo uses no proxy for it.
        ("http://127.0.0.1:PORT/secret", "registry_not_allowed"),
        ("http://localhost:PORT/secret", "registry_not_allowed"),
    ],
)
@pytest.mark.parametrize("how", ["redirect", "token"])
async def test_a_registry_leads_skopeo_to_no_other_service(
    place: Path, authority: Authority, image: BuiltImage, service: Service, where: str, code: str, how: str
) -> None:
    target = where.replace("PORT", str(service.port))

    def leads(request: Request) -> bool:
        if how == "redirect" and request.path.endswith(image.blobs[0]):
            answer(request, 307, Location=target)
            return True
        if how == "token" and "Bearer" not in request.headers.get("Authorization", ""):
            answer(request, 401, b"{}", WWW_Authenticate=f'Bearer realm="{target}",service="s",scope="all"')
            return True
        return False

    with Secure(authority, image.layout, leads) as server:
        options = {"certificates": place / "certificates", "registries": lambda is_admin: resolve}
        async with opened(place, isolation=Isolation(users=USERS, places=(place,)), skopeo=options) as images:
            error = await refused(
                images, parse_reference(f"{server.address}/app:t"), auth_file(server.address, PASSWORD)
            )
    assert error.code == code
    assert not service.asked


@needs_registry
async def test_a_registry_on_loopback_has_to_be_allowed(place: Path, service: Service) -> None:
    async with opened(place, skopeo={"registries": lambda is_admin: resolve}) as images:
        error = await refused(images, parse_reference(f"127.0.0.1:{service.port}/app:t"))
    assert error.code == "registry_not_allowed"
    assert not service.asked


@asynccontextmanager
async def proxy_of(
    registry: str = PUBLIC, *plain_http: str, proxies: dict[str, str] | None = None
) -> AsyncIterator[FetchProxy]:
    reference = Reference("docker", f"{registry}/app", tag="t")
    async with open_proxy(reference, frozenset(plain_http), resolve, proxies or {}) as found:
        yield found


def plain(service: WebServer) -> AbstractAsyncContextManager[FetchProxy]:
    """A proxy for an image of a registry without TLS."""
    address = f"127.0.0.1:{service.port}"
    return proxy_of(address, address)


async def ask(proxy: FetchProxy, line: str, *fields: str, word: str | None = None) -> bytes:
    """Sends a request to the proxy, and returns all that comes back."""
    user, _, place = proxy.environment["HTTP_PROXY"].removeprefix("http://").rpartition("@")
    host, _, port = place.partition(":")
    user = base64.b64encode((word or user).encode()).decode()
    head = "\r\n".join([line, f"Proxy-Authorization: Basic {user}", *fields, "", ""])
    with trio.fail_after(30):
        async with await trio.open_tcp_stream(host, int(port)) as stream:
            await stream.send_all(head.encode())
            return b"".join([piece async for piece in stream])


async def until(proxy: FetchProxy, line: str, expected: bytes) -> None:
    """Returns once the proxy answers a request so."""
    while expected not in await ask(proxy, line):
        pass


async def test_the_proxy_is_for_skopeo_alone(service: Service) -> None:
    async with plain(service) as found:
        assert b" 407 " in await ask(found, f"GET {service.origin}/ HTTP/1.1", word="volant:guess")
        assert b" 407 " in await ask(found, f"CONNECT 127.0.0.1:{service.port} HTTP/1.1", word="volant:")
        assert not service.asked


@pytest.mark.parametrize(
    ("line", "fields", "status"),
    [
        ("nonsense", (), 400),
        ("CONNECT registry.test HTTP/1.1", (), 400),
        ("CONNECT [::1 HTTP/1.1", (), 400),
        ("CONNECT registry.test:99999 HTTP/1.1", (), 400),
        ("GET /path HTTP/1.1", (), 400),
        ("GET ftp://registry.test/ HTTP/1.1", (), 400),
        ("POST http://registry.test/ HTTP/1.1", ("Content-Length: -1",), 400),
        ("GET http://registry.test/ HTTP/1.1", ("A: b",) * 200, 431),
        ("GET http://registry.test/ HTTP/1.1", (f"A: {'b' * 40_000}",), 431),
        ("CONNECT inside.test:443 HTTP/1.1", (), 403),
        ("CONNECT %31%32%37.0.0.1:443 HTTP/1.1", (), 403),
        # 127.0.0.1 by other names.
        ("CONNECT 2130706433:80 HTTP/1.1", (), 403),
        ("CONNECT [::ffff:127.0.0.1]:80 HTTP/1.1", (), 403),
        (f"CONNECT {'a' * 300}:443 HTTP/1.1", (), 403),
        ("CONNECT registry.test:1 HTTP/1.1", (), 502),
    ],
)
async def test_the_proxy_refuses_what_it_does_not_understand_or_allow(
    line: str, fields: tuple[str, ...], status: int
) -> None:
    async with proxy_of() as found:
        assert f" {status} ".encode() in (await ask(found, line, *fields)).split(b"\r\n")[0]
        assert (found.failure is not None) == (status in (403, 502))


async def test_a_request_without_tls_is_passed_on_and_the_next_one_comes_anew(service: Service) -> None:
    async with plain(service) as found:
        answered = await ask(found, f"GET {service.origin}/v2/?a=b HTTP/1.1", "Authorization: Basic x", "Host: h")
        assert answered.endswith(b'{"token":"t"}')
        assert service.asked == [("/v2/?a=b", "Basic x")]
        # Another request behind it would go to a host that it does not name.
        body = "Content-Length: 3\r\n\r\nabcGET http://inside.test/ HTTP/1.1"
        await ask(found, f"POST {service.origin}/token HTTP/1.1", "Host: h", body)
        assert service.asked[1:] == [("/token", "abc")]
        assert found.failure is None


async def test_credentials_go_to_no_other_host_without_tls(service: Service) -> None:
    # A registry with TLS does not lead to one without.
    async with proxy_of() as found:
        assert b" 502 " in await ask(found, f"GET http://{OTHER}:{service.port}/blob HTTP/1.1")
    async with proxy_of("127.0.0.1:9", "127.0.0.1:9") as found:
        other = f"http://{OTHER}:{service.port}"
        assert b" 200 " in await ask(found, f"GET {other}/blob HTTP/1.1")
        assert b" 502 " in await ask(found, f"GET {other}/token HTTP/1.1", "Authorization: Basic x")
        assert b" 502 " in await ask(found, f"POST {other}/token HTTP/1.1", "Content-Length: 1", "", "x")
    assert service.asked == [("/blob", None)]


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_a_proxy_of_the_operator_gets_its_password_and_no_request_for_a_private_host(
    place: Path, scheme: str
) -> None:
    heads: list[bytes] = []
    authority = Authority(place)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority.issue("127.0.0.1"))

    async def other_proxy(stream: trio.abc.Stream) -> None:
        if scheme == "https":
            stream = trio.SSLStream(stream, context, server_side=True, https_compatible=True)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += await stream.receive_some(1000)
        heads.append(head)
        await stream.send_all(b"HTTP/1.1 403 No\r\n\r\n" if b"storage" in head else b"HTTP/1.1 200 OK\r\n\r\nhello")
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, host="127.0.0.1"), other_proxy, 0)
        port = listener.socket.getsockname()[1]
        there = f"{scheme}://user:w%6frd@127.0.0.1:{port}"
        trusted = ssl.create_default_context(cafile=authority.path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ssl, "create_default_context", lambda: trusted)
            async with proxy_of(PUBLIC, f"{PUBLIC}:80", proxies={"http_proxy": there, "HTTPS_PROXY": there}) as found:
                answered = await ask(found, f"CONNECT {PUBLIC}:443 HTTP/1.1")
                assert answered.split(b"\r\n\r\n", 1) == [b"HTTP/1.1 200 OK", b"hello"]
                assert (await ask(found, f"GET http://{PUBLIC}/v2/ HTTP/1.1", "Host: h")).endswith(b"hello")
                assert b" 403 " in await ask(found, f"CONNECT {INSIDE}:443 HTTP/1.1")
                assert found.failure is not None
            async with proxy_of(proxies={"HTTPS_PROXY": there}) as found:
                assert b" 502 " in await ask(found, f"CONNECT {OTHER}:443 HTTP/1.1")
                assert "403" in str(found.failure)
        nursery.cancel_scope.cancel()
    word = base64.b64encode(b"user:word").decode()
    assert [head.split(b" HTTP")[0] for head in heads] == [
        b"CONNECT registry.test:443",
        b"GET http://registry.test:80/v2/",
        b"CONNECT storage.test:443",
    ]
    for head in heads:
        assert f"Proxy-Authorization: Basic {word}\r\n".encode() in head
        assert head.count(b"Proxy-Authorization") == 1


async def test_registries_without_tls_have_a_private_address_only_if_the_image_is_theirs(service: Service) -> None:
    address = f"127.0.0.1:{service.port}"
    async with proxy_of(PUBLIC, address) as found:
        assert b" 403 " in await ask(found, f"GET {service.origin}/blob HTTP/1.1")
        assert service.port not in found.ports
    async with proxy_of(address, address) as found:
        assert b" 200 " in await ask(found, f"GET {service.origin}/blob HTTP/1.1")
        assert service.port in found.ports


async def test_mirrors_of_the_host_may_have_any_address(
    place: Path, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{service.port}"
    (place / "registries.conf").write_text(
        f"""
        short-name-mode = "enforcing"
        [[registry]]
        location = "{PUBLIC}"
        [[registry.mirror]]
        location = "{address}/cache"
        insecure = true
        [[registry]]
        prefix = "*.other.test"
        location = "mirror.test:5000"
        """
    )
    (place / "registries.conf.d").mkdir()
    (place / "registries.conf.d" / "half.conf").write_text("[[registry]")
    (place / "registries.conf.d" / "more.conf").write_text(
        '[[registry]]\nprefix = "a.test/team"\nlocation = "b.test"\n'
    )
    assert mirrors_of(f"{PUBLIC}/app", place) == {PUBLIC: False, address: True}
    assert mirrors_of("x.other.test/app", place) == {"mirror.test:5000": False}
    assert mirrors_of("a.test/team/app", place) == {"b.test": False}
    assert mirrors_of("a.test/teams/app", place) == mirrors_of("other.test/app", place) == {}
    monkeypatch.setattr("volant.oci._proxy.mirrors_of", partial(mirrors_of, directory=place))
    async with proxy_of(PUBLIC) as found:
        assert service.port in found.ports
        assert b" 200 " in await ask(found, f"GET {service.origin}/v2/ HTTP/1.1", "Authorization: Basic x")
        assert b" 403 " in await ask(found, f"CONNECT {INSIDE}:443 HTTP/1.1")
    async with proxy_of(OTHER) as found:
        assert service.port not in found.ports
        assert b" 502 " in await ask(found, f"GET {service.origin}/v2/ HTTP/1.1")


async def test_the_proxy_has_places_for_skopeo_and_no_more(service: Service) -> None:
    async with plain(service) as found:
        port = int(found.environment["HTTP_PROXY"].rpartition(":")[2])
        held = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(32)]
        await until(found, f"GET {service.origin}/ HTTP/1.1", b" 503 ")
        for each in held:
            await each.aclose()
        await until(found, f"GET {service.origin}/ HTTP/1.1", b" 200 ")
