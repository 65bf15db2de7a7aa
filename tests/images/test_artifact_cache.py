"""The cache of artifacts: each is fetched once, whole and verified or not at all; a failed fetch leaves nothing."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.ports import free_port
from tests.web_server import WebServer, answer
from volant.images import (
    ANYWHERE,
    ArtifactCache,
    ImageError,
    Origins,
    Progress,
    _artifact_cache as artifact_cache,
    _artifacts as artifacts,
    _download as downloading,
    artifact_path,
    fetch,
    list_artifacts,
    parse_networks,
    remove_artifact,
)
from volant.images._child import run_child
from volant.model import Artifact

LIMIT = 64 * 2**20
DATA = os.urandom(3 * 2**20) + bytes(8 * 2**20) + os.urandom(1000)
HERE = Origins(networks=parse_networks(["127.0.0.1"]))
"""Allows the servers of these tests."""
DIGEST = hashlib.sha256(DATA).hexdigest()


class Server(WebServer):
    """An HTTP server that behaves as the path of each request says."""

    def __init__(self) -> None:
        super().__init__(protocol="HTTP/1.1")
        self.requests: list[tuple[str, str | None]] = []
        self.release = threading.Event()
        self.asked = threading.Event()

    def get(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append((request.path, request.headers.get("Range")))
        self.asked.set()
        request.close_connection = True
        getattr(self, request.path.split("?")[0].strip("/"))(request)

    def whole(self, request: BaseHTTPRequestHandler) -> None:
        answer(request, 200, DATA)

    def held(self, request: BaseHTTPRequestHandler) -> None:
        answer(request, 200, None, Content_Length=len(DATA))
        request.wfile.write(DATA[:1000])
        self.release.wait(30)
        request.wfile.write(DATA[1000:])

    def breaks(self, request: BaseHTTPRequestHandler) -> None:
        """Sends a piece at a time, and the rest on a `Range` request."""
        begin = int((request.headers.get("Range") or "bytes=0-")[6:-1])
        headers = {"Content_Range": f"bytes {begin}-{len(DATA) - 1}/{len(DATA)}"} if begin else {}
        answer(request, 206 if begin else 200, None, Content_Length=len(DATA) - begin, **headers)
        request.wfile.write(DATA[begin : begin + 4 * 2**20])

    def cut(self, request: BaseHTTPRequestHandler) -> None:
        """Always sends a piece from the beginning."""
        answer(request, 200, None, Content_Length=len(DATA))
        request.wfile.write(DATA[:1000])

    def endless(self, request: BaseHTTPRequestHandler) -> None:
        answer(request, 200, None)
        try:
            while True:
                request.wfile.write(os.urandom(1024 * 1024))
        except OSError:
            pass

    def huge(self, request: BaseHTTPRequestHandler) -> None:
        answer(request, 200, None, Content_Length=LIMIT + 1)

    def silent(self, request: BaseHTTPRequestHandler) -> None:
        self.release.wait(30)

    def stalls(self, request: BaseHTTPRequestHandler) -> None:
        answer(request, 200, None, Content_Length=len(DATA))
        self.release.wait(30)

    def drips(self, request: BaseHTTPRequestHandler) -> None:
        answer(request, 200, None, Content_Length=len(DATA))
        while not self.release.wait(0.05):
            request.wfile.write(b"x")

    def gone(self, request: BaseHTTPRequestHandler) -> None:
        answer(request, 404)

    def sick(self, request: BaseHTTPRequestHandler) -> None:
        answer(request, 503)

    def away(self, request: BaseHTTPRequestHandler) -> None:
        answer(request, 302, Location="/whole")

    def circle(self, request: BaseHTTPRequestHandler) -> None:
        answer(request, 302, Location="/circle")

    def elsewhere(self, request: BaseHTTPRequestHandler) -> None:
        answer(request, 302, Location="file:///etc/passwd")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(downloading, "_FIRST_PAUSE_S", 0.0)
    with Server() as server:
        yield server
        server.release.set()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(DATA)
    return path


def get(cache: Path, url: str | Path, digest: str = DIGEST) -> Path:
    return fetch(cache, str(url), digest, max_bytes=LIMIT, origins=ANYWHERE).path


def code(cache: Path, url: str | Path, digest: str = DIGEST) -> str:
    """Returns the code of a failing fetch, which must leave nothing."""
    with pytest.raises(ImageError) as caught:
        get(cache, url, digest)
    print(caught.value)
    folder = cache / "artifacts"
    assert not folder.exists() or list(folder.iterdir()) == []
    return caught.value.code


@pytest.mark.parametrize("way", ["whole", "away", "breaks"])
def test_an_http_download_is_stored_by_its_digest(cache: Path, server: Server, way: str) -> None:
    path = get(cache, f"{server.origin}/{way}?token=secret")
    assert path == artifact_path(cache, DIGEST)
    assert path.read_bytes() == DATA
    assert path.stat().st_mode & 0o777 == 0o400
    (artifact,) = list_artifacts(cache)
    assert (artifact.url, artifact.size_bytes) == (f"{server.origin}/{way}?…", len(DATA))
    server.requests.clear()
    assert get(cache, f"{server.origin}/gone") == path
    assert server.requests == []


def test_a_broken_transfer_is_continued(cache: Path, server: Server) -> None:
    get(cache, f"{server.origin}/breaks")
    assert [wanted for _, wanted in server.requests] == [None, "bytes=4194304-", "bytes=8388608-"]


@pytest.mark.parametrize(
    ("way", "expected", "requests"),
    [
        ("gone", "artifact_missing", 1),
        ("sick", "artifact_unreachable", 5),
        ("cut", "artifact_unreachable", 2),
        ("huge", "artifact_too_large", 1),
        ("endless", "artifact_too_large", 1),
        ("circle", "artifact_unreachable", 5),
        ("elsewhere", "artifact_unreachable", 1),
    ],
)
def test_errors_of_servers_have_codes(cache: Path, server: Server, way: str, expected: str, requests: int) -> None:
    assert code(cache, f"{server.origin}/{way}") == expected
    assert len(server.requests) == requests


@pytest.mark.parametrize("way", ["silent", "stalls"])
def test_a_silent_server_is_unreachable(cache: Path, server: Server, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "_STALL_S", 0.1)
    assert code(cache, f"{server.origin}/{way}") == "artifact_unreachable"
    assert len(server.requests) == 5


def test_a_closed_port_is_unreachable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloading, "_FIRST_PAUSE_S", 0.0)
    port = free_port()
    assert code(cache, f"http://127.0.0.1:{port}/") == "artifact_unreachable"


async def test_the_failure_of_one_source_is_not_that_of_another(
    cache: Path, server: Server, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a client that claims the digest of somebody else's artifact keeps it from everybody."""
    begun, may_end = trio.Event(), trio.Event()

    async def slow(arguments: list[str], record: Callable[[Progress], None]) -> None:
        if str(other) in arguments:
            begun.set()
            await may_end.wait()
        await run_child(arguments, record)

    async def claim() -> None:
        with pytest.raises(ImageError):
            await kept.obtain(Artifact(str(other), DIGEST))

    async def obtain() -> None:
        assert (await kept.obtain(Artifact(f"{server.origin}/whole", DIGEST))).path.read_bytes() == DATA

    monkeypatch.setattr(artifact_cache, "run_child", slow)
    other = tmp_path / "other"
    other.write_bytes(b"something else")
    kept = ArtifactCache(cache, tmp_path / "state", timeout_s=30, max_mb=64, origins=HERE)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(claim)
            await begun.wait()
            nursery.start_soon(obtain)
            while not kept._under_way[DIGEST].done.statistics().tasks_waiting:  # noqa: ASYNC110
                await trio.sleep(0.01)
            may_end.set()


def test_a_different_file_is_refused_without_its_digest(cache: Path, server: Server, local: Path) -> None:
    for url, name in ((f"{server.origin}/whole", "artifact_mismatch"), (str(local), "artifact_missing")):
        with pytest.raises(ImageError) as caught:
            get(cache, url, "0" * 64)
        assert caught.value.code == name
        assert DIGEST not in str(caught.value)


def test_errors_do_not_show_whether_a_local_file_exists(cache: Path, local: Path, tmp_path: Path) -> None:
    below = Origins((tmp_path,))
    (tmp_path / "out").symlink_to("/etc/passwd")
    said = set()
    for path in (local, tmp_path / "none", tmp_path / "out", tmp_path / "../../../etc/passwd", Path("/etc/passwd")):
        with pytest.raises(ImageError) as caught:
            fetch(cache, str(path), "0" * 64, max_bytes=LIMIT, origins=below)
        said.add((caught.value.code, str(caught.value)))
    assert len(said) == 1


@pytest.mark.parametrize("form", ["{}", "file://{}", "file://localhost{}"])
def test_a_local_file_is_copied_with_its_holes(cache: Path, tmp_path: Path, form: str) -> None:
    source = tmp_path / "spar se"
    with source.open("wb") as handle:
        handle.write(DATA[:5000])
        handle.truncate(32 * 2**20)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    name = str(source) if form == "{}" else str(source).replace(" ", "%20")
    path = get(cache, form.format(name), digest)
    assert path.stat().st_size == 32 * 2**20
    assert path.stat().st_blocks * 512 < 2**20
    assert not path.samefile(source)
    # Writes to the original do not change the artifact.
    with source.open("r+b") as handle:
        handle.write(b"changed")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest


def test_special_files_are_refused_at_once(cache: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "none", tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        assert code(cache, path) == "artifact_missing"


def test_a_local_file_may_be_too_large(cache: Path, tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as handle:
        handle.truncate(LIMIT + 1)
    assert code(cache, tmp_path / "large") == "artifact_too_large"


def test_a_nearly_full_disk_is_refused(
    cache: Path, server: Server, local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volant.store._files._RESERVE_BYTES", 2**60)
    assert code(cache, local) == "cache_full"
    assert code(cache, f"{server.origin}/endless") == "cache_full"


def test_a_full_disk_leaves_nothing(cache: Path, local: Path) -> None:
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1048576, 1048576));"
        "from volant.images.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["fetch", "--cache", str(cache), "--url", str(local), "--sha256", DIGEST, "--max-bytes", str(LIMIT)]
    arguments += ["--allow-directory", str(local.parent)]
    ended = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "the cache can't be written: File too large" in ended.stderr
    assert list((cache / "artifacts").iterdir()) == []


def test_a_touched_artifact_is_verified_again_and_replaced_if_changed(cache: Path, local: Path) -> None:
    path = get(cache, local)
    inode = path.stat().st_ino
    os.utime(path)
    assert list_artifacts(cache) == []
    assert get(cache, local).stat().st_ino == inode
    path.chmod(0o600)
    with path.open("r+b") as handle:
        handle.write(b"changed")
    assert get(cache, local).read_bytes() == DATA
    assert path.stat().st_ino != inode
    path.with_name(f"{DIGEST}.json").write_text("nonsense")
    local.unlink()
    assert get(cache, local).read_bytes() == DATA


def test_the_next_fetch_removes_parts_of_killed_ones(cache: Path, local: Path) -> None:
    with artifacts.locked_part(cache, "1" * 64) as under_way:
        dead = under_way.with_name("2" * 64 + ".part")
        dead.write_bytes(b"half")
        get(cache, local)
        assert under_way.exists()
        assert not dead.exists()


def test_an_artifact_can_be_removed(cache: Path, local: Path) -> None:
    get(cache, local)
    assert remove_artifact(cache, DIGEST)
    assert not remove_artifact(cache, DIGEST)
    assert list((cache / "artifacts").iterdir()) == []


async def test_ten_callers_share_one_fetch(cache: Path, server: Server) -> None:
    cached = ArtifactCache(cache, cache.parent, timeout_s=30, max_mb=64, origins=HERE)
    artifact = Artifact(f"{server.origin}/held", DIGEST)
    paths = set()

    async def want() -> None:
        paths.add((await cached.obtain(artifact)).path)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(want)
            await trio.to_thread.run_sync(server.asked.wait, 20)
            assert list(cached.inspect()) == [DIGEST]
            server.release.set()
    assert paths == {artifact_path(cache, DIGEST)}
    assert len(server.requests) == 1
    assert cached.inspect() == {}


async def test_ten_callers_share_one_failure(cache: Path, server: Server) -> None:
    cached = ArtifactCache(cache, cache.parent, timeout_s=30, max_mb=64, origins=HERE)
    artifact = Artifact(f"{server.origin}/gone", DIGEST)
    said = []

    async def want() -> None:
        with pytest.raises(ImageError) as caught:
            await cached.obtain(artifact)
        said.append(caught.value)

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(want)
    assert {error.code for error in said} == {"artifact_missing"}
    assert all(artifact.url in error.message and DIGEST in error.message for error in said)
    assert len(server.requests) == 1


async def test_a_slow_server_hits_the_deadline(cache: Path, server: Server) -> None:
    cached = ArtifactCache(cache, cache.parent, timeout_s=2.0, max_mb=64, origins=HERE)
    with trio.fail_after(30):
        with pytest.raises(ImageError, match="did not arrive within 2 s") as caught:
            await cached.obtain(Artifact(f"{server.origin}/drips", DIGEST))
    assert caught.value.code == "timeout"


async def test_cancelling_ends_the_fetch_and_a_waiting_caller_restarts_it(cache: Path, server: Server) -> None:
    cached = ArtifactCache(cache, cache.parent, timeout_s=30, max_mb=64, origins=HERE)
    artifact = Artifact(f"{server.origin}/held", DIGEST)
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            leaving = trio.CancelScope()

            async def leave() -> None:
                with leaving:
                    await cached.obtain(artifact)

            nursery.start_soon(leave)
            await trio.to_thread.run_sync(server.asked.wait, 20)
            nursery.start_soon(cached.obtain, artifact)
            await trio.testing.wait_all_tasks_blocked()
            leaving.cancel()
            server.release.set()
    assert leaving.cancelled_caught
    assert len(server.requests) == 2
    # The second fetch has removed the part of the first one.
    assert {path.name for path in (cache / "artifacts").iterdir()} == {DIGEST, f"{DIGEST}.json"}


async def test_an_upload_has_a_deadline_while_the_same_artifact_is_fetched(cache: Path) -> None:
    cached = ArtifactCache(cache, cache.parent, timeout_s=0.5, max_mb=64)
    begun, over, ended = threading.Event(), threading.Event(), threading.Event()

    def fetch_slowly() -> None:
        with artifacts.locked_part(cache, DIGEST):
            begun.set()
            over.wait(5)
        ended.set()

    async def send() -> None:
        async with cached.receiving(DIGEST, "default") as upload:
            await upload.write(DATA)
            await upload.finish()

    fetcher = threading.Thread(target=fetch_slowly)
    fetcher.start()
    try:
        await trio.to_thread.run_sync(begun.wait)
        with pytest.raises(ImageError) as caught:
            await send()
        assert caught.value.code == "timeout"
        assert not ended.is_set()
    finally:
        over.set()
        fetcher.join()


async def test_a_project_can_not_take_all_places_for_uploads(cache: Path) -> None:
    cached = ArtifactCache(cache, cache.parent, timeout_s=60, max_mb=64)
    async with AsyncExitStack() as uploads:
        for number in range(4):
            await uploads.enter_async_context(cached.receiving(f"{number:064x}", "busy"))
        with pytest.raises(ImageError, match="4 of project 'busy'") as refused:
            await uploads.enter_async_context(cached.receiving(DIGEST, "busy"))
        assert refused.value.code == "cache_busy"
        async with cached.receiving(DIGEST, "quiet") as upload:
            await upload.write(DATA)
            await upload.finish()
        for number in range(4, 16):
            await uploads.enter_async_context(cached.receiving(f"{number:064x}", f"project-{number}"))
        with pytest.raises(ImageError, match="16 of all projects"):
            await uploads.enter_async_context(cached.receiving(DIGEST, "quiet"))
    # All gave their places back.
    async with cached.receiving(DIGEST, "busy"):
        pass
