"""Snapshots without guests, and a proxy before a registry that counts what passes, and fails on purpose."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import msgspec

from tests.api.kit import Api, api
from volant.hypervisor import MachineKind
from volant.model import BASE, DEFAULT_PROJECT, Boot, OciImage, Snapshot, VmRow, VolumeMount
from volant.transfer import TransferSettings

PIECE = 256 * 1024
MEMORY_MB = 64
KERNELS = (("no-kernel", b"a kernel"), ("no-initramfs", b"an initramfs"))


def piece(letter: str) -> bytes:
    """Returns a piece of a guest's memory."""
    return letter.encode() * PIECE


@asynccontextmanager
async def host(path: Path, registry: str, **options: Any) -> AsyncIterator[Api]:
    """Runs a host that may use a registry."""
    path.mkdir()  # noqa: ASYNC240
    for name, content in KERNELS:
        (path / name).write_bytes(content)
    options.setdefault("transfer", TransferSettings(plain_http=frozenset([registry])))
    async with api(path, **options) as running:
        yield running


async def take(
    running: Api,
    name: str,
    letters: str,
    *,
    volume: bytes | None = None,
    image: OciImage | None = None,
    project: str = DEFAULT_PROJECT,
    **row: Any,
) -> Snapshot:
    """Makes a snapshot, whose memory begins with a piece for each letter; a blank is a hole."""
    copies = running.deps.vms.copies
    directory = copies.checkpoints.snapshot_dir / f"pull-{name}"
    directory.mkdir(parents=True)
    with (directory / "memory").open("wb") as file:
        for at, letter in enumerate(letters):
            if letter != " ":
                file.seek(at * PIECE)
                file.write(piece(letter))
        file.truncate(MEMORY_MB * 2**20)
    (directory / "state").write_bytes(b"devices of " + name.encode())
    names = ["memory", "state"]
    mounts: tuple[VolumeMount, ...] = ()
    if volume is not None:
        mounts = (VolumeMount(name="data", id="0123456789abcdef", path="/data"),)
        (directory / f"{mounts[0].id}.img").write_bytes(volume)
        names.append(f"{mounts[0].id}.img")
    manifest = BASE
    if image is not None:
        manifest = msgspec.structs.replace(BASE, boot=Boot(image=image))
        (directory / "root.qcow2").write_bytes(b"a disk")
        names.insert(2, "root.qcow2")
        row["layer"] = "7-a"
    now = datetime.now(UTC)
    vm = VmRow(
        id=7, name="demo", project=project, cpu_cores=1, memory_mb=MEMORY_MB, plugin="base", runtime="base",
        manifest=manifest, created_at=now, updated_at=now, image="custom", volumes=mounts, **row,
    )  # fmt: skip
    snapshot = Snapshot(id=f"{name}-id", name=name, vm=vm, created_at=now, paused_ms=1.5, volumes=bool(mounts))
    return await copies.add_snapshot(snapshot, directory, names, await kind_of(running), 3)


async def kind_of(running: Api) -> MachineKind:
    """Returns the kind of this host's machines."""
    version = (await running.deps.vms.copies.checkpoints.hypervisor.choice()).version or ""
    machine = f"pc-q35-{'.'.join(version.split('.')[:2])}"
    return MachineKind(version=version, accelerator="tcg", machine=machine, devices=3)


def files_of(running: Api, snapshot: str) -> dict[str, bytes]:
    """Returns the content of a snapshot's files; volumes by their number."""
    found = next(one for one in running.deps.store.projection.snapshots.values() if one.name == snapshot)
    directory = running.deps.vms.copies.checkpoints.at(found.checkpoint)
    return {
        f"volume-{0}" if path.suffix == ".img" else path.name: path.read_bytes()
        for path in sorted(directory.iterdir())
        if path.name != "checkpoint.json"
    }


async def push(running: Api, snapshot: str, reference: str, **headers: str) -> Any:
    """Pushes a snapshot; returns the answer."""
    return await running.client.post(
        f"/api/v1/snapshots/{snapshot}/push", json={"reference": reference}, headers=headers, timeout=60
    )


async def pull(running: Api, reference: str, name: str | None = None, **headers: str) -> Any:
    """Pulls a snapshot; returns the answer."""
    body = {"reference": reference, **({} if name is None else {"name": name})}
    return await running.client.post("/api/v1/snapshots/pull", json=body, headers=headers, timeout=60)


def code_of(answer: Any) -> str:
    """Returns the code of an error."""
    return str(answer.json()["type"]).removeprefix("urn:volant:error:")


def left_by_pulls(running: Api) -> list[str]:
    """Returns what pulls have left that did not end well."""
    directory = running.deps.vms.copies.checkpoints.snapshot_dir
    return sorted(path.name for path in directory.glob("pull-*")) if directory.exists() else []


class Proxy:
    """Passes requests on to a registry.

    `fails` decides about each request, before it is passed on: True if it has dealt with it. `changes` may change what
    the registry answers.
    """

    def __init__(self, registry: str) -> None:
        self.fails: Callable[[BaseHTTPRequestHandler], bool] = lambda request: False
        self.changes: Callable[[str, bytes], bytes] = lambda path, body: body
        self.sent: list[str] = []
        """Blobs that were put, by digest, once the registry has them."""
        self.received: list[str] = []
        """Likewise blobs that were got."""
        self.requests: list[str] = []
        self.under_way = 0
        """How many requests are being passed on."""
        self._counting = threading.Lock()
        self.released = threading.Event()
        """Set when the proxy ends, for those that stall."""
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy._pass(self, registry)

            do_HEAD = do_PUT = do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self.address = f"127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _pass(self, request: BaseHTTPRequestHandler, registry: str) -> None:
        self.requests.append(f"{request.command} {request.path}")
        if self.fails(request):
            return
        with self._counting:
            self.under_way += 1
        try:
            self._pass_on(request, registry)
        finally:
            with self._counting:
                self.under_way -= 1

    def _pass_on(self, request: BaseHTTPRequestHandler, registry: str) -> None:
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        upstream = http.client.HTTPConnection(registry, timeout=30)
        try:
            upstream.request(request.command, request.path, body, dict(request.headers))
            answer = upstream.getresponse()
            content = answer.read()
        finally:
            upstream.close()
        blob = request.path.partition("digest=")[2] or request.path.rpartition("/blobs/")[2]
        if request.command == "PUT" and answer.status == 201 and "digest=" in request.path:
            self.sent.append(blob)
        if request.command == "GET" and answer.status == 200:
            changed = self.changes(request.path, content)
            if changed is not content:
                content = changed
                answer.headers.replace_header("Content-Length", str(len(content)))
            if "/blobs/" in request.path:
                self.received.append(blob)
        request.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("connection", "transfer-encoding", "date"):
                request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)


def refuse(request: BaseHTTPRequestHandler, status: int, **headers: str) -> None:
    """Answers with an error of a registry, once the body was read."""
    request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = json.dumps({"errors": [{"code": "TESTED", "message": "on purpose"}]}).encode()
    request.send_response(status)
    for name, value in {**headers, "Content-Length": str(len(body))}.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def cut(request: BaseHTTPRequestHandler) -> None:
    """Ends the connection in the middle of an answer."""
    request.send_response(200)
    request.send_header("Content-Length", "1000000")
    request.end_headers()
    request.wfile.write(b"a beginning")
    request.close_connection = True


def trickle(proxy: Proxy, request: BaseHTTPRequestHandler, *parts: bytes) -> None:
    """Sends a part of an answer, and another, for as long as the client listens."""
    with suppress(OSError):
        for part in itertools.cycle(parts):
            request.wfile.write(part)
            if proxy.released.wait(0.05):
                break
    request.close_connection = True
