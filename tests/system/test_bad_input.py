"""Invalid input is answered with a 4xx problem+json that names the field, and has no effect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.system.kit import Daemon
from volant import images

GOOD = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}
DEEP = b'{"name":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def body(**fields: Any) -> bytes:
    return json.dumps({**GOOD, **fields}).encode()


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (b"", None),
        (b"no json", None),
        (b"\xff\xfe", None),
        (b"[]", None),
        (b'{"cpu_cores":1}', "name"),
        (DEEP, None),
        (body(name=7), "name"),
        (body(name="a" * 64), "name"),
        (body(name="../etc"), "name"),
        (body(name=""), "name"),
        (body(name="Demo"), "name"),
        (body(name="demo\n"), "name"),
        (body(cpu_cores=0), "cpu_cores"),
        (body(cpu_cores="one"), "cpu_cores"),
        (body(cpu_cores=1.5), "cpu_cores"),
        (body(memory_mb=63), "memory_mb"),
        (body(memory_mb=10**30), "memory_mb"),
        (body(memory_mb="much"), "memory_mb"),
        (body(colour="red"), "colour"),
        (body(kernel_cmdline="a\nb"), "kernel_cmdline"),
        (body(kernel_cmdline="x" * 5000), "kernel_cmdline"),
        (body(labels={"a": 1}), "labels"),
        (body(labels={str(i): "" for i in range(65)}), "labels"),
        (body(env={"A=B": "x"}), "env"),
        (body(restart_policy="sometimes"), "restart_policy"),
        (body(ttl="soon"), "ttl"),
        (body(ttl="0s"), "ttl"),
    ],
)
async def test_a_bad_body_is_400_and_names_the_field(daemon: Daemon, content: bytes, field: str | None) -> None:
    async with daemon.http() as http:
        answer = await http.post("/api/v1/vms", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        problem = answer.json()
        assert problem["status"] == 400
        assert problem["detail"] == problem["error"]
        assert problem["request_id"] == answer.headers["x-request-id"]
        assert len(answer.content) < 2000
        if field is not None:
            assert problem["field"].split(".")[0].split("[")[0] == field, problem
        assert (await http.get("/api/v1/vms")).json() == []


@pytest.mark.parametrize(
    ("method", "path", "field"),
    [
        ("GET", "/api/v1/vms?colour=red", "colour"),
        ("GET", "/api/v1/vms?limit=many", "limit"),
        ("GET", "/api/v1/vms?status=fine", "status"),
        ("GET", "/api/v1/events/vms?types=VM_FINE", "types"),
        ("POST", "/api/v1/vms?wait=fine", "wait"),
        ("POST", "/api/v1/vms?wait=running&timeout=soon", "timeout"),
        ("POST", "/api/v1/vms?wait=running&timeout=11m", "timeout"),
    ],
)
async def test_a_bad_parameter_is_400_and_is_named(daemon: Daemon, method: str, path: str, field: str) -> None:
    async with daemon.http() as http:
        answer = await http.request(method, path, json=GOOD if method == "POST" else None)
        assert (answer.status_code, answer.json()["field"]) == (400, field), answer.text
        assert (await http.get("/api/v1/vms")).json() == []


async def test_less_memory_than_the_image_needs_is_400_with_the_number(daemon: Daemon, image_cache: Path) -> None:
    image = images.find(image_cache)
    assert image is not None
    async with daemon.http() as http:
        answer = await http.post("/api/v1/vms", json={**GOOD, "memory_mb": image.min_memory_mb - 1})
        assert (answer.status_code, answer.json()["field"]) == (400, "memory_mb")
        assert str(image.min_memory_mb) in answer.json()["detail"]


async def test_a_body_of_100_mb_is_413_and_costs_no_memory(daemon: Daemon) -> None:
    size = 100_000_000
    before_mb = daemon.rss_mb()

    async def pieces() -> Any:
        for _ in range(size // 1_000_000):
            yield bytes(1_000_000)

    async with daemon.http() as http:
        for headers in ({"Content-Length": str(size)}, {}):
            sent = {"Content-Type": "application/json", **headers}
            answer = await http.post("/api/v1/vms", content=pieces(), headers=sent)
            assert answer.status_code == 413
            assert answer.headers["content-type"] == "application/problem+json"
            print(f"{daemon.rss_mb() - before_mb:.1f} MiB more")
            assert daemon.rss_mb() - before_mb < 30


@pytest.mark.parametrize("name", ["nobody", "..%2fetc", "a" * 64, "%00"])
async def test_an_unknown_vm_is_404(daemon: Daemon, name: str) -> None:
    async with daemon.http() as http:
        for method, path in (
            ("GET", ""),
            ("DELETE", ""),
            ("POST", "/start"),
            ("GET", "/logs"),
            ("GET", "/agent/healthz"),
            ("GET", "/ports/80/"),
        ):
            answer = await http.request(method, f"/api/v1/vms/{name}{path}")
            assert answer.status_code == 404, (method, path, answer.text)
            assert answer.headers["content-type"] == "application/problem+json"


async def test_a_client_that_sends_half_a_request_blocks_nobody(daemon: Daemon) -> None:
    host, port = daemon.base_url.removeprefix("http://").split(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(b"POST /api/v1/vms HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        async with daemon.http() as http:
            assert (await http.get("/healthz")).status_code == 200


async def test_a_foreign_host_is_421(daemon: Daemon) -> None:
    async with daemon.http() as http:
        answer = await http.get("/api/v1/vms", headers={"Host": "rebound.example"})
        assert answer.status_code == 421
