"""A guest sends a client no further than to itself."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.api.test_relay import WAYS, Guest, guest, prefix
from volant.relay._redirect import GuestServer

OF_PORT = GuestServer(vm="demo", host=b"localhost:8080", target="/a/b?q=1")
OF_AGENT = GuestServer(vm="demo", host=b"agent", target="/a/b")
PORT = b"/api/v1/vms/demo/ports/8080"
AGENT = b"/api/v1/vms/demo/agent"


@pytest.mark.parametrize(
    ("said", "path"),
    [
        (b"/", b"/"),
        (b"/login?next=%2Fa#top", b"/login?next=%2Fa#top"),
        (b"c", b"/a/c"),
        (b"./c/", b"/a/c/"),
        (b"..", b"/"),
        (b"?page=2", b"/a/b?page=2"),
        (b"#top", b"/a/b?q=1#top"),
        (b"", b"/a/b?q=1"),
        (b"x:y", None),
        (b"./x:y", b"/a/x:y"),
        (b"/a b\xc3\xa4\t", b"/a%20b%C3%A4"),
        (b"/a//b", b"/a//b"),
    ],
)
def test_a_redirect_to_a_path_stays_in_the_guest(said: bytes, path: bytes | None) -> None:
    assert OF_PORT.place(said) == (None if path is None else PORT + path)


@pytest.mark.parametrize(
    "said",
    [
        b"/../../../../other/stop",
        b"../../../../../other/stop",
        b"/%2e%2e/%2E./other/stop",
        b"/a/..\\..\\..\\other/stop",
        b"http://localhost:8080/../other/stop",
    ],
)
def test_no_path_leads_out_of_the_guest(said: bytes) -> None:
    assert OF_PORT.place(said) == PORT + b"/other/stop"
    assert OF_AGENT.place(said.replace(b"localhost:8080", b"agent")) == AGENT + b"/other/stop"


@pytest.mark.parametrize(
    ("said", "place"),
    [
        (b"http://localhost:8080/x", b"/api/v1/vms/demo/ports/8080/x"),
        (b"HTTP://127.0.0.1:8080?x", b"/api/v1/vms/demo/ports/8080/?x"),
        (b"//[::1]:9000#x", b"/api/v1/vms/demo/ports/9000/#x"),
        (b"http://localhost", b"/api/v1/vms/demo/ports/80/"),
    ],
)
def test_an_address_on_the_guests_loopback_is_that_port_of_the_guest(said: bytes, place: bytes) -> None:
    assert OF_PORT.place(said) == place
    assert OF_AGENT.place(said) == place


def test_the_host_agent_is_the_agent_itself() -> None:
    assert OF_AGENT.place(b"http://agent/x") == AGENT + b"/x"
    assert OF_AGENT.place(b"/x") == AGENT + b"/x"
    assert OF_PORT.place(b"http://agent/x") is None


@pytest.mark.parametrize(
    "said",
    [
        b"https://evil.example/",
        b"//evil.example/",
        b"/\\evil.example/",
        b"\\\\evil.example/",
        b" \t//evil.example/",
        b"http:evil.example",
        b"http:/evil.example",
        b"http://localhost:8080@evil.example/",
        b"http://localhost.evil.example/",
        b"http://localhost:8080\\@evil.example/",
        b"http://localhost:99999/",
        b"http://localhost:0/",
        b"https://localhost:8080/",
        b"javascript:alert(1)",
        b"/\t/evil.example/",
        b"ht\ttp://evil.example/",
    ],
)
def test_any_spelling_of_another_host_stays_in_the_guest_or_is_no_redirect(said: bytes) -> None:
    place = OF_PORT.place(said)
    assert place is None or (place.startswith(PORT + b"/") and b"\t" not in place and b"\\" not in place)


async def send_to(at: Guest, way: str, where: str, **headers: str) -> httpx.Response:
    target = f"{prefix(at, way)}/moved/here"
    return await at.client.get(target, params={"to": where}, headers=headers, follow_redirects=True)


async def test_a_client_that_follows_stays_in_the_guest(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS:
            for where in ("/there", "../there", f"http://localhost:{at.port}/there"):
                answer = await send_to(at, way, where, **{"x-volant-api-key": "key"})
                assert (answer.status_code, answer.text) == (200, "GET")
                assert answer.url.path in (f"{prefix(at, way)}/there", f"{prefix(at, 'port')}/there")
                assert at.seen[-1]["raw_path"] == b"/there"


async def test_no_client_is_sent_to_another_host(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        for way in WAYS:
            for header in ({}, {"x-volant-api-key": "key"}, {"authorization": "Bearer key"}):
                answer = await send_to(at, way, "http://evil.example/", **header)
                assert (answer.status_code, answer.headers["volant-location"]) == (307, "http://evil.example/")
                assert "location" not in answer.headers


def test_a_page_reloads_itself_and_goes_nowhere_else_by_a_header() -> None:
    said = [(b"refresh", b"5"), (b"refresh", b"0; url=http://127.0.0.1:7777/api/v1/vms"), (b"x-own", b"kept")]
    assert OF_PORT.redirect(said) == [(b"refresh", b"5"), (b"x-own", b"kept")]


def test_the_header_uri_is_removed() -> None:
    """Python's urllib follows it where there is no `Location`."""
    said = [(b"uri", b"http://127.0.0.1:7777/api/v1/vms"), (b"x-own", b"kept")]
    assert OF_PORT.redirect(said) == [(b"x-own", b"kept")]


async def test_a_guest_can_not_send_volant_location(tmp_path: Path) -> None:
    async with guest(tmp_path) as at:
        answer = await at.api.server.get(f"{prefix(at, 'port')}/evil")
        assert "volant-location" not in answer.headers
