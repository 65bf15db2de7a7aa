"""A client that names a host file in a manifest neither reads it nor learns of it. Cached artifacts are private."""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.api.kit import Api, api
from tests.attackers.local_user import needs_root, run_code
from tests.cli.kit import volar
from volant.http import ApiSettings
from volant.images import PUBLIC, ImageError, Origins, artifact_path
from volant.model import Artifact

pytestmark = needs_root

SECRET = b"root:$y$j9T$secret:19000:0:99999:7:::\n"
DIGEST = hashlib.sha256(SECRET).hexdigest()
KEY = "0123456789abcdef0123456789abcdef"

ASK = r"""
import http.client, json, socket, sys
address, method, path, headers, body = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4]), sys.argv[5]
connection = http.client.HTTPConnection("127.0.0.1", timeout=30)
if address.startswith("/"):
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(address)
else:
    connection.port = int(address)
connection.request(method, path, body.encode(), headers)
answer = connection.getresponse()
print(json.dumps([answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read().decode()]))
"""


def secret_in(path: Path, mode: int) -> Path:
    path.write_bytes(SECRET)
    path.chmod(mode)
    return path


@pytest.fixture
def secret(root: Path) -> Path:
    """A file that only root may read."""
    return secret_in(root / "shadow", 0o600)


@pytest.fixture
def public(root: Path) -> Path:
    """A world-readable file in a directory that all may pass through."""
    return secret_in(root / "public", 0o644)


@asynccontextmanager
async def daemon(root: Path, origins: Origins = PUBLIC, key: str | None = None) -> AsyncIterator[tuple[Api, str]]:
    """Serves the API on a port and at a Unix socket that everybody may open. Yields the socket's path, too."""
    state = root / "state"
    state.mkdir(mode=0o711)
    path = str(root / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        (root / "socket").chmod(0o666)
        listener.listen()
        settings = ApiSettings(api_keys=(key,)) if key else None
        async with api(state, settings, origins=origins, sockets=[listener]) as running:
            yield running, path


def manifest(path: Path | str, digest: str = DIGEST, name: str = "evil") -> dict[str, Any]:
    return {"name": name, "boot": {"rootfs": {"url": str(path), "sha256": digest}}}


async def ask(address: str | int, method: str, path: str, body: object = "", **headers: str) -> tuple[int, Any, Any]:
    """Returns status, headers and body of the response to a request of `nobody`."""
    text = body if isinstance(body, str) else json.dumps(body)
    fields = {"Content-Type": "application/json", **{name.replace("_", "-"): value for name, value in headers.items()}}
    said = await trio.to_thread.run_sync(run_code, ASK, address, method, path, json.dumps(fields), text)
    status, answered, content = json.loads(said)
    return status, answered, json.loads(content) if content else None


async def test_no_client_can_name_other_files_of_the_host(root: Path, secret: Path, public: Path) -> None:
    async with daemon(root) as (running, path):
        said = set()
        for named, digest in ((secret, DIGEST), (secret, "0" * 64), (public, DIGEST), (root / "none", DIGEST)):
            for address in (running.server.port, path):
                status, _, answer = await ask(address, "POST", "/api/v1/plugins", manifest(named, digest))
                said.add((status, answer["type"], answer["detail"]))
            answer = await running.client.post("/api/v1/plugins", json=manifest(named, digest))
            said.add((answer.status_code, answer.json()["type"], answer.json()["detail"]))
        assert len(said) == 1
        (status, kind, _) = said.pop()
        assert (status, kind.rpartition(":")[2]) == (403, "artifact-not-allowed")
        assert not artifact_path(root / "state/cache", DIGEST).exists()


async def test_files_below_artifact_dirs_can_be_named_and_no_link_leads_out(root: Path, secret: Path) -> None:
    images = root / "images"
    images.mkdir()
    (images / "site").write_bytes(SECRET)
    (images / "link").symlink_to(secret)
    (images / "up").symlink_to("..")
    async with daemon(root, Origins((images,))) as (running, _):
        artifacts = running.deps.vms.artifacts
        for number, named in enumerate((images / "site", images / "link", images / "up/shadow", images / "none")):
            status, _, answer = await ask(
                running.server.port, "POST", "/api/v1/plugins", manifest(named, name=f"p{number}")
            )
            # It is fetched when a VM boots.
            assert status == 201, answer
        status, _, _ = await ask(running.server.port, "POST", "/api/v1/plugins", manifest(f"{images}/../shadow"))
        assert status == 403
        said = set()
        for named in (images / "link", images / "up/shadow", images / "none", secret):
            with pytest.raises(ImageError) as caught:
                await artifacts.obtain(Artifact(str(named), DIGEST))
            said.add((caught.value.code, caught.value.message.replace(str(named), "")))
        assert len(said) == 1
        assert (await artifacts.obtain(Artifact(str(images / "site"), DIGEST))).path.read_bytes() == SECRET


async def test_an_upload_is_verified_limited_and_private(root: Path) -> None:
    place = f"/api/v1/artifacts/{DIGEST}"
    async with daemon(root) as (running, _):
        port = running.server.port
        status, headers, answer = await ask(port, "PUT", place, SECRET.decode())
        assert (status, answer) == (201, {"sha256": DIGEST, "size_bytes": len(SECRET)})
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["cross-origin-resource-policy"] == "same-origin"

        path = artifact_path(root / "state/cache", DIGEST)
        assert path.read_bytes() == SECRET
        for each in (path, path.with_name(f"{DIGEST}.json"), path.parent):
            assert each.stat().st_mode & 0o077 == 0, each
        assert run_code(_TRY, path) == "no\n"
        # Afterwards manifests can name it, wherever it was.
        assert (await ask(port, "POST", "/api/v1/plugins", manifest("/somewhere/site")))[0] == 201

        status, _, answer = await ask(port, "PUT", f"/api/v1/artifacts/{'0' * 64}", SECRET.decode())
        assert (status, answer["type"].rpartition(":")[2]) == (400, "artifact-mismatch")
        assert DIGEST not in json.dumps(answer)
        status, _, answer = await ask(port, "PUT", f"/api/v1/artifacts/{'1' * 64}", Content_Length=str(2**40))
        assert status == 413
        assert {each.name for each in path.parent.iterdir()} == {DIGEST, f"{DIGEST}.json"}


async def test_an_upload_is_refused_from_foreign_pages_and_without_a_key(root: Path) -> None:
    place = f"/api/v1/artifacts/{DIGEST}"
    async with daemon(root, key=KEY) as (running, _):
        port = running.server.port
        assert (await ask(port, "PUT", place, "x"))[0] == 401
        keyed = {"X_Volant_API_Key": KEY}
        assert (await ask(port, "PUT", place, "x", Origin="https://evil.example", **keyed))[0] == 403
        assert (await ask(port, "PUT", place, "x", Host="evil.example", **keyed))[0] == 421
        for site in ("cross-site", "same-site"):
            assert (await ask(port, "PUT", place, "x", Sec_Fetch_Site=site, **keyed))[0] == 403
        assert not (root / "state/cache/artifacts").exists()
        assert (await ask(port, "PUT", place, SECRET.decode(), **keyed))[0] == 201


async def test_volar_uploads_files_that_the_daemon_does_not_read(root: Path, secret: Path, public: Path) -> None:
    described = root / "site.json"
    await trio.Path(described).write_text(json.dumps(manifest(secret, name="site")))
    async with daemon(root, key=KEY) as (running, _):
        environ = {"VOLANT_API_BASE": f"http://127.0.0.1:{running.server.port}", "VOLANT_API_KEY": KEY}
        done = await volar(None, "plugins", "install", str(described), environ=environ)
        assert (done.code, done.out) == (0, b"site 0 is installed\n"), done.err
        assert f"uploading {secret}" in done.err
        assert artifact_path(root / "state/cache", DIGEST).read_bytes() == SECRET

        # For a file that volar can't read either, the daemon's error is shown.
        await trio.Path(described).write_text(json.dumps(manifest(root / "none", "0" * 64, name="other")))
        done = await volar(None, "plugins", "install", str(described), environ=environ)
        assert done.code == 1
        assert "this client may not name it" in done.err
        assert "volar plugins upload" in done.err
        await trio.Path(described).write_text(json.dumps(manifest(public, "0" * 64, name="other")))
        done = await volar(None, "plugins", "install", str(described), environ=environ)
        assert done.code == 1
        assert "nothing was sent" in done.err
        assert "uploading" not in done.err

        done = await volar(None, "plugins", "upload", str(described), environ=environ)
        assert done.code == 0, done.err
        assert b" is in the cache" in done.out


async def test_too_many_uploads_are_refused(root: Path) -> None:
    head = b"PUT /api/v1/artifacts/%s HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nx" % DIGEST.encode()
    async with daemon(root) as (running, _):
        streams = [await running.server.connect() for _ in range(4)]
        for stream in streams:
            await stream.send_all(head)
        folder = root / "state/cache/artifacts"
        with trio.fail_after(10):
            while not folder.is_dir() or len(list(folder.iterdir())) < 4:  # noqa: ASYNC110 - the daemon's
                await trio.sleep(0.01)
        status, _, answer = await ask(running.server.port, "PUT", f"/api/v1/artifacts/{DIGEST}", SECRET.decode())
        assert (status, answer["type"].rpartition(":")[2]) == (503, "cache-busy")
        for stream in streams:
            await stream.aclose()
        with trio.fail_after(10):
            while list(folder.iterdir()):  # noqa: ASYNC110 - the daemon's
                await trio.sleep(0.01)
        assert (await ask(running.server.port, "PUT", f"/api/v1/artifacts/{DIGEST}", SECRET.decode()))[0] == 201


_TRY = "import sys\ntry: open(sys.argv[1]).close(); print('yes')\nexcept OSError: print('no')"
