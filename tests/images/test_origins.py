"""Artifacts are fetched from the checked addresses of public servers, unless the operator allows more."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.web_server import WebServer, answer
from volant.images import PUBLIC, ImageError, Origins, _origins as origins, fetch, parse_networks

DATA = b"what an internal service says"
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.1.2.3",
        "::1",
        "0.0.0.0",
        "::",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.127.1",
        "169.254.169.254",
        "fe80::1%lo",
        "fd00:ec2::254",
        "fec0::1",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "224.0.0.251",
        "ff02::1",
        "240.0.0.1",
        "255.255.255.255",
        "::ffff:127.0.0.1",
        "::ffff:168.63.129.16",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::7f00:1",
        "2002:7f00:1::1",
        "2001:0:7f00:1::1",
    ],
)
def test_an_address_that_is_not_public_is_refused(address: str) -> None:
    assert not origins.is_allowed(address, PUBLIC)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_a_public_address_is_allowed(address: str) -> None:
    assert origins.is_allowed(address, PUBLIC)


def test_the_operator_can_name_networks() -> None:
    named = Origins(networks=parse_networks(["10.0.0.0/8", "fd00::/8"]))
    assert origins.is_allowed("10.1.2.3", named)
    assert origins.is_allowed("::ffff:10.1.2.3", named)
    assert origins.is_allowed("fd12::1", named)
    assert not origins.is_allowed("192.168.0.1", named)


class Service(WebServer):
    """An HTTP server at a loopback address."""

    def __init__(self, address: str, location: str | None = None) -> None:
        super().__init__(address)
        self.asked = 0
        self.url = f"{self.origin}/"
        self._location = location

    def get(self, request: BaseHTTPRequestHandler) -> None:
        self.asked += 1
        if self._location:
            answer(request, 302, Location=self._location)
        else:
            answer(request, 200, DATA)


@pytest.fixture
def internal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """An internal service."""
    for name in ("http_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Service("127.0.0.2") as service:
        yield service


def refused(cache: Path, url: str, allowed: Origins = PUBLIC) -> str:
    """Returns the message of a refused fetch."""
    with pytest.raises(ImageError) as caught:
        fetch(cache, url, DIGEST, max_bytes=2**20, origins=allowed)
    assert caught.value.code == "artifact_refused"
    return str(caught.value)


def test_an_internal_service_gets_no_request(tmp_path: Path, internal: Service) -> None:
    for host in ("127.0.0.2", "127.2", "2130706434", "0x7f000002", "[::ffff:127.0.0.2]", "%31%32%37.0.0.2"):
        refused(tmp_path, f"http://{host}:{internal.port}/")
    refused(tmp_path, f"http://127.0.0.2%3A{internal.port}/")
    assert internal.asked == 0
    named = Origins(networks=parse_networks(["127.0.0.2"]))
    fetch(tmp_path, internal.url, DIGEST, max_bytes=2**20, origins=named)
    assert internal.asked == 1


def test_no_proxy_gets_a_request_for_an_internal_service(
    tmp_path: Path, internal: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Service("127.0.0.1") as proxy:
        for name in ("http_proxy", "https_proxy"):
            monkeypatch.setenv(name, proxy.url)
        for host in ("127.0.0.2", "%31%32%37.0.0.2"):
            refused(tmp_path, f"http://{host}:{internal.port}/")
            refused(tmp_path, f"https://{host}:{internal.port}/")
        assert proxy.asked == 0
        fetch(tmp_path, "http://1.1.1.1/", DIGEST, max_bytes=2**20, origins=PUBLIC)
        assert proxy.asked == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a network namespace")
def test_no_address_of_this_host_is_public() -> None:
    """Nor the second address of an interface, for which the kernel's choice would be the first."""
    code = (
        "from volant.images import PUBLIC, _origins\n"
        "print([_origins.is_allowed(each, PUBLIC) for each in ('9.9.9.5', '9.9.9.6', '9.9.10.7')])"
    )
    addresses = "ip link set lo up && ip addr add 9.9.9.5/24 dev lo && ip addr add 9.9.9.6/24 dev lo"
    script = f'{addresses} && exec "$0" -c "$1"'
    done = subprocess.run(
        ["unshare", "--net", "sh", "-c", script, sys.executable, code],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[False, False, True]"


def test_a_redirect_to_an_internal_service_is_not_followed(tmp_path: Path, internal: Service) -> None:
    with Service("127.0.0.1", location=internal.url) as server:
        refused(tmp_path, server.url, Origins(networks=parse_networks(["127.0.0.1"])))
    assert (server.asked, internal.asked) == (1, 0)


def test_dns_rebinding_reaches_no_internal_service(
    tmp_path: Path, internal: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hostile name server: a public address for the check, an internal one for the connection."""
    answers = iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"])

    def rebinding(host: str, port: int, **_: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    monkeypatch.setattr("volant.images._download._FIRST_PAUSE_S", 0.0)
    named = Origins(networks=parse_networks(["127.0.0.1"]))
    with pytest.raises(ImageError):
        fetch(tmp_path, f"http://attacker.example:{internal.port}/", DIGEST, max_bytes=2**20, origins=named)
    assert internal.asked == 0


def test_errors_do_not_show_which_names_exist(
    tmp_path: Path, internal: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resolve(host: str, port: int, **_: Any) -> list[Any]:
        if host.startswith("wiki"):
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("10.1.2.3", port))]
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    there, not_there = refused(tmp_path, "http://wiki.corp/"), refused(tmp_path, "http://none.corp/")
    assert there.replace("wiki.corp", "") == not_there.replace("none.corp", "")
