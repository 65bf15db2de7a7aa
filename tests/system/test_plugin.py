"""A plugin in a real guest: its actions, its OpenAPI document, and its manifest inside the guest."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import pytest
import trio

from tests.system.kit import REPOSITORY, Daemon, run, shared_vm, spec, until
from volant.client import ClientProblem

# The guest's Python does not have http.server.
SERVER = r"""
import hashlib, json, os, socket, threading

manifest = json.load(open(os.environ["VOLANT_MANIFEST"]))

def answer(method, path, headers, body):
    if path == "/manifest":
        return 200, manifest
    if path == "/openapi.json":
        paths = {action["path"]: {} for action in manifest["actions"].values()}
        return 200, {"openapi": "3.1.0", "info": {"title": "Real", "version": "1"}, "paths": paths}
    if path.startswith("/v1/digest"):
        told = {"method": method, "path": path, "type": headers.get("content-type")}
        return 200, {**told, "sha256": hashlib.sha256(body).hexdigest()}
    if path == "/bytes":
        return 200, bytes(range(256)) * 4096
    return 418, {"detail": "no"}

def serve(sock):
    with sock, sock.makefile("rb") as stream:
        method, path, _ = stream.readline().decode().split()
        headers = {}
        while (line := stream.readline().decode().strip()):
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = stream.read(int(headers.get("content-length", 0)))
        status, value = answer(method, path, headers, body)
        kind = "application/octet-stream" if isinstance(value, bytes) else "application/json"
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data)

listener = socket.create_server(("127.0.0.1", 8080), backlog=16)
while True:
    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
MANIFEST = {
    "name": "web",
    "version": "1.2",
    "labels": {"team": "a"},
    "workload": {
        "entrypoint": ["python3.13", "-c", SERVER],
        "port": 8080,
        "health_check": {"path": "/manifest", "interval_s": 0.2},
    },
    "actions": {
        "digest": {"path": "/v1/digest", "method": "PUT"},
        "bytes": {"path": "/bytes", "method": "GET"},
        "refuse": {"path": "/refuse"},
        "manifest": {"path": "/manifest", "method": "GET"},
    },
}
DOCUMENT = {"openapi": "3.1.0", "info": {"title": "Kept", "version": "1"}, "paths": {}}


@pytest.fixture(scope="module", autouse=True)
def guest(module_daemon: Daemon) -> Iterator[None]:
    """A VM of the plugin; the tests of this module share it."""
    with shared_vm(module_daemon, MANIFEST):
        yield


async def test_the_workload_performs_an_action(daemon: Daemon) -> None:
    data = bytes(range(251)) * 4000
    async with daemon.client() as client:
        async with client.vms.call_action(
            "demo", "digest", content=data, content_type="x/y", query={"a": "b c"}
        ) as answer:
            assert answer.status == 200
            told = json.loads(await answer.read())
        assert told == {
            "method": "PUT", "path": "/v1/digest?a=b+c", "type": "x/y", "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip
        async with client.vms.call_action("demo", "bytes", plugin="web") as answer:
            assert answer.content_type == "application/octet-stream"
            assert await answer.read() == bytes(range(256)) * 4096
        async with client.vms.call_action("demo", "refuse", {"a": 1}) as answer:
            assert (answer.status, await answer.read()) == (418, b'{"detail": "no"}')
        with pytest.raises(ClientProblem, match="no action 'other'"):
            async with client.vms.call_action("demo", "other"):
                pass


async def test_the_guest_knows_its_plugin(daemon: Daemon) -> None:
    async with daemon.client() as client:
        info = await client.vms.agent_info("demo")
        async with client.vms.call_action("demo", "manifest") as answer:
            seen = json.loads(await answer.read())
        file = json.loads(await run(client, "demo", "cat", "/run/volant-manifest.json"))
    assert info["plugin"] == {
        "name": "web", "version": "1.2", "labels": {"team": "a"}, "actions": ["bytes", "digest", "manifest", "refuse"],
    }  # fmt: skip
    assert seen == file == MANIFEST


async def test_the_workloads_openapi_document_points_to_the_daemon(daemon: Daemon) -> None:
    async with daemon.client() as client, daemon.http() as http:
        document = await client.vms.openapi("demo")
        assert document["info"]["title"] == "Real"
        # One path is below /v1/, which belongs to the agent.
        (server,) = document["servers"]
        assert server["url"] == "/api/v1/vms/demo/agent/v1/workload"
        answer = await http.get(server["url"] + "/v1/digest")
        assert answer.json()["path"] == "/v1/digest"


async def test_volar_calls_it(daemon: Daemon) -> None:
    call = [sys.executable, "-m", "volant.cli.main", "--api", daemon.base_url, "call", "demo"]
    volar = partial(trio.run_process, capture_stdout=True, capture_stderr=True, check=False, cwd=REPOSITORY)
    with trio.fail_after(60):
        done: subprocess.CompletedProcess[bytes] = await volar([*call, "digest", "a=b", "c:=1"])
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["sha256"] == hashlib.sha256(b'{"a":"b","c":1}').hexdigest()
        assert (await volar([*call, "bytes"])).stdout == bytes(range(256)) * 4096
        assert (await volar([*call, "other"])).returncode == 3


async def test_a_vm_that_is_stopped(daemon: Daemon) -> None:
    """Also with a plugin whose manifest contains the document: it is available before the VM has run."""
    async with daemon.client() as client:
        await client.vms.stop("demo")
        await until(client, "demo", "stopped")
        with pytest.raises(ClientProblem) as conflict:
            async with client.vms.call_action("demo", "bytes"):
                pass
        assert (conflict.value.status, conflict.value.vm) == (409, "demo")
        with pytest.raises(ClientProblem) as none:
            await client.vms.openapi("demo")
        assert none.value.status == 404
        await client.plugins.install({"name": "kept", "openapi": DOCUMENT})
        await client.vms.create(spec("other", plugin="kept"))
        assert (await client.vms.openapi("other"))["info"] == DOCUMENT["info"]
        await client.vms.delete("other")
        await client.plugins.delete("kept")
