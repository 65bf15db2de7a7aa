"""Redirects of registries that the daemon follows, and the registries that it sends credentials to."""

from __future__ import annotations

import base64
import ipaddress
import json
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from tests.api.kit import Api
from tests.oci.registry import Registry, needs_registry
from tests.transfer.kit import Proxy, code_of, host, pull, push, refuse, take
from tests.web_server import WebServer, answer
from volant.images import Origins
from volant.model import Role
from volant.oci._credentials import Credentials, find_credentials
from volant.transfer import TransferSettings

pytestmark = [pytest.mark.programs, needs_registry]

USER = base64.b64encode(b"user:word").decode()
LOOPBACK = Origins(networks=(ipaddress.ip_network("127.0.0.1/32"),))
Request = BaseHTTPRequestHandler


def auth(registry: str, **entry: str) -> dict[str, str]:
    content = json.dumps({"auths": {registry: entry}}).encode()
    return {"Volant-Registry-Auth": base64.b64encode(content).decode()}


class TokenService(WebServer):
    """Gives tokens for the repositories of a registry."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        super().__init__(address)
        self.asked: list[tuple[str, dict[str, list[str]]]] = []

    def get(self, request: Request) -> None:
        self.asked.append((request.headers.get("Authorization", ""), parse_qs(urlsplit(request.path).query)))
        answer(request, 200, json.dumps({"token": f"token-{len(self.asked)}"}).encode())

    def post(self, request: Request, body: bytes) -> None:
        self.asked.append(("", parse_qs(body.decode())))
        answer(request, 200, json.dumps({"access_token": f"token-{len(self.asked)}"}).encode())


def wants_token(proxy: Proxy, service: TokenService, valid: set[str]) -> None:
    """Lets the registry want a token of the service."""

    def fails(request: Request) -> bool:
        if request.headers.get("Authorization", "").removeprefix("Bearer ") in valid:
            return False
        refuse(request, 401, WWW_Authenticate=f'Bearer realm="{service.origin}/token",service="the registry"')
        return True

    proxy.fails = fails


async def test_a_token_is_fetched_for_the_repository_and_again_when_it_has_expired(
    proxy: Proxy, tmp_path: Path
) -> None:
    valid = {"token-1"}
    with TokenService() as service:
        wants_token(proxy, service, valid)
        async with host(tmp_path / "here", proxy.address) as here:
            await take(here, "warm", "abcdef")
            reference = f"{proxy.address}/team/token:1"
            assert (await push(here, "warm", reference, **auth(proxy.address, auth=USER))).status_code == 200
            basic, asked = service.asked.pop()
            assert basic == f"Basic {USER}"
            assert asked == {"scope": ["repository:team/token:pull,push"], "service": ["the registry"]}
            assert not service.asked

        async with host(tmp_path / "there", proxy.address) as there:
            valid = {"token-1"}
            wants_token(proxy, service, valid)
            left, before = [4], proxy.fails

            def expires(request: Request) -> bool:
                left[0] -= 1
                if left[0] == 0:
                    valid.clear()
                    valid.add("token-2")
                return before(request)

            proxy.fails = expires
            got = await pull(there, reference, **auth(proxy.address, identitytoken="refresh"))
            assert got.status_code == 201, got.text
            # One for all requests that were refused at the same time.
            assert len(service.asked) == 2
            assert service.asked[0][1]["refresh_token"] == ["refresh"]
            assert service.asked[0][1]["scope"] == ["repository:team/token:pull"]


async def test_a_token_that_is_refused_is_not_asked_for_for_ever(proxy: Proxy, tmp_path: Path) -> None:
    with TokenService() as service:
        wants_token(proxy, service, set())
        async with host(tmp_path / "here", proxy.address) as here:
            refused = await pull(here, f"{proxy.address}/team/token:1")
            assert (refused.status_code, code_of(refused)) == (403, "image-unauthorized")
            assert len(service.asked) == 1


async def test_a_token_service_elsewhere_needs_https(proxy: Proxy, tmp_path: Path) -> None:
    with TokenService() as service:
        service.origin = service.origin.replace("127.0.0.1", "localhost")
        wants_token(proxy, service, {"token-1"})
        async with host(tmp_path / "here", proxy.address) as here:
            refused = await pull(here, f"{proxy.address}/team/token:1", **auth(proxy.address, auth=USER))
            assert (refused.status_code, code_of(refused)) == (503, "registry-unreachable")
            assert "without HTTPS" in refused.text
            assert not service.asked


async def test_storage_elsewhere_gets_no_credentials(proxy: Proxy, registry: Registry, tmp_path: Path) -> None:
    seen: list[str | None] = []
    with Proxy(registry.address) as storage:

        def note(request: Request) -> bool:
            seen.append(request.headers.get("Authorization"))
            return False

        def redirects(request: Request) -> bool:
            if request.command == "GET" and "/blobs/" in request.path:
                refuse(request, 307, Location=f"http://{storage.address}{request.path}")
                return True
            return False

        async with host(tmp_path / "here", proxy.address) as here:
            await take(here, "warm", "abc", volume=bytes(2**20 - 1) + b"x")
            reference = f"{proxy.address}/team/elsewhere:1"
            await push(here, "warm", reference)
            with TokenService() as service:
                wants_token(proxy, service, {"token-1"})
                before = proxy.fails
                proxy.fails = lambda request: before(request) or redirects(request)
                storage.fails = note
                await here.client.delete("/api/v1/snapshots/warm")
                assert (await pull(here, reference, **auth(proxy.address, auth=USER))).status_code == 201
    assert len(seen) > 3
    assert set(seen) == {None}


async def test_storage_elsewhere_names_no_token_service(proxy: Proxy, registry: Registry, tmp_path: Path) -> None:
    with Proxy(registry.address) as storage, TokenService() as service:
        wants_token(storage, service, set())

        def redirects(request: Request) -> bool:
            refuse(request, 307, Location=f"http://{storage.address}{request.path}")
            return True

        proxy.fails = redirects
        async with host(tmp_path / "here", proxy.address) as here:
            refused = await pull(here, f"{proxy.address}/team/elsewhere:1", **auth(proxy.address, auth=USER))
            assert (refused.status_code, code_of(refused)) == (403, "image-unauthorized")
        assert not service.asked


async def test_a_client_that_is_no_administrator_reaches_no_private_address(
    proxy: Proxy, registry: Registry, tmp_path: Path
) -> None:
    reference = f"{proxy.address}/team/private:1"
    async with host(tmp_path / "here", proxy.address, origins=LOOPBACK) as here:
        await take(here, "warm", "abc", project="default")
        assert (await push(here, "warm", reference)).status_code == 200
        await as_operator(here)
        assert (await pull(here, reference, "one")).status_code == 201
        with TokenService("127.0.0.2") as inside:

            def redirects(request: Request) -> bool:
                refuse(request, 307, Location=f"{inside.origin}/metadata")
                return True

            proxy.fails = redirects
            assert code_of(await pull(here, reference, "two")) == "registry-not-allowed"
            wants_token(proxy, inside, {"token-1"})
            # Another host is asked for a token with HTTPS alone.
            assert code_of(await pull(here, reference, "three")) == "registry-unreachable"
            assert code_of(await pull(here, f"{inside.origin.removeprefix('http://')}/x:1")) == "registry-not-allowed"
            assert not inside.asked


async def test_a_proxy_gets_its_user_and_no_request_for_a_private_address(
    proxy: Proxy, registry: Registry, tmp_path: Path
) -> None:
    reference, seen = f"{proxy.address}/team/proxied:1", set()
    with Proxy(registry.address) as forward, TokenService("127.0.0.2") as inside:

        def note(request: Request) -> bool:
            seen.add(request.headers["Proxy-Authorization"])
            return False

        forward.fails = note
        transfer = TransferSettings(
            plain_http=frozenset([proxy.address]),
            environment={"HTTP_PROXY": f"http://user:w%6frd@{forward.address}", "no_proxy": "127.0.0.3"},
        )
        async with host(tmp_path / "here", proxy.address, origins=LOOPBACK, transfer=transfer) as here:
            await take(here, "warm", "abc")
            assert (await push(here, "warm", reference)).status_code == 200
            assert seen == {f"Basic {USER}"}
            await as_operator(here)
            assert (await pull(here, reference, "one")).status_code == 201
            forward.requests.clear()

            def redirects(request: Request) -> bool:
                refuse(request, 307, Location=f"{inside.origin.replace('127', '%31%32%37')}/metadata")
                return True

            forward.fails = redirects
            assert code_of(await pull(here, reference, "two")) == "registry-not-allowed"
            assert len(forward.requests) == 1


async def as_operator(here: Api) -> None:
    """Lets the client use the key of an operator from now on."""
    body = {"name": "ci", "role": Role.OPERATOR.value, "project": "default"}
    administrator = await here.client.post("/api/v1/keys", json={"name": "root", "role": "admin"})
    assert administrator.status_code == 201, administrator.text
    here.client.headers["x-volant-api-key"] = administrator.json()["key"]
    made = await here.client.post("/api/v1/keys", json=body)
    assert made.status_code == 201, made.text
    here.client.headers["x-volant-api-key"] = made.json()["key"]


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"registry:5000": "a"}, "a"),
        ({"registry:5000": "a", "registry:5000/team": "b", "registry:5000/team/app": "c"}, "c"),
        ({"registry:5000/other": "a"}, ""),
        ({"https://registry:5000/v2/": "a"}, "a"),
        ({"registry": "a"}, ""),
    ],
)
def test_the_entry_with_the_longest_name_counts(names: dict[str, str], found: str) -> None:
    content: Any = {"auths": {name: {"auth": word} for name, word in names.items()}}
    assert find_credentials(json.dumps(content).encode(), "registry:5000/team/app") == Credentials(found)
