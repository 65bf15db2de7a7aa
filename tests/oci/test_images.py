"""Images from registries and files: fetched once, whole or not at all, and each failure says what to do."""

from __future__ import annotations

import base64
import json
import os
import stat
import sys
import tarfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from tests.oci.kit import BuiltImage, as_root, extract, small_disk, tar, write_layout
from tests.oci.registry import PASSWORD, USER, FailingRegistry, Registry, auth_file, needs_registry
from tests.web_server import answer
from volant.host import Host
from volant.oci import (
    FetchLimits,
    Isolation,
    OciError,
    OciImages,
    Port,
    Reference,
    Skopeo,
    open_images,
    parse_reference,
)

pytestmark = [pytest.mark.programs, needs_registry]

BASE = tar(("etc", {}), ("etc/base", {"data": os.urandom(200_000)}), ("bin/su", {"data": b"x", "mode": 0o4755}))
FIRST = tar(("etc", {}), ("etc/first", {"data": b"1"}))
SECOND = tar(("etc", {}), ("etc/.wh.base", {"data": b""}), ("etc/second", {"data": b"2"}))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry") / "r") as found:
        yield found


@pytest.fixture
def image(tmp_path: Path) -> BuiltImage:
    return write_layout(tmp_path / "layout", [BASE, FIRST], Cmd=["first"], ExposedPorts={"80/tcp": {}})


@asynccontextmanager
async def opened(tmp_path: Path, *plain_http: str, **limits: Any) -> AsyncIterator[OciImages]:
    skopeo = Skopeo(
        Host(),
        tmp_path / "private",
        plain_http=frozenset(plain_http),
        stalled_s=limits.pop("stalled_s", 60.0),
        retries=limits.pop("retries", 0),
        isolation=limits.pop("isolation", Isolation()),
        **limits.pop("skopeo", {}),
    )
    options = limits.pop("options", {})
    async with open_images(Host(), tmp_path / "cache/oci", skopeo, limits=FetchLimits(**limits), **options) as images:
        yield images


def named(registry: Registry | FailingRegistry, name: str = "app:t") -> Reference:
    return parse_reference(f"{registry.address}/{name}")


def left(tmp_path: Path) -> list[str]:
    """Returns what a fetch must not leave."""
    places = [tmp_path / "cache/oci/work", tmp_path / "private"]
    return [path.name for place in places if place.exists() for path in place.iterdir()]


async def refused(images: OciImages, reference: Reference, auth: bytes | None = None) -> OciError:
    with trio.fail_after(60), pytest.raises(OciError) as caught:
        await images.obtain(reference, auth=auth)
    return caught.value


async def test_an_image_of_a_registry_is_fetched_once_and_kept(
    tmp_path: Path, registry: Registry, image: BuiltImage
) -> None:
    registry.push(image.layout, "kept:t")
    async with opened(tmp_path, registry.address) as images:
        found = await images.obtain(named(registry, "kept:t"), auth=registry.auth)
        assert found.digest == image.digest
        assert found.config.cmd == ("first",)
        assert found.config.exposed_ports == (Port(80),)
        assert found.names == (f"{registry.address}/kept:t",)
        assert {stat.S_IMODE(path.stat().st_mode) for path in (*found.layers, found.metadata)} == {0o400}
        tree = extract(found.metadata, found.layers, tmp_path / "tree")
        assert (tree / "etc/first").read_bytes() == b"1"
        assert (tree / "bin/su").stat().st_mode & 0o7777 == 0o4755
        # Without credentials: nothing is asked of the registry.
        assert (await images.obtain(named(registry, "kept:t"))).layers == found.layers
    async with opened(tmp_path, registry.address) as images:
        assert [each.digest for each in await images.all()] == [image.digest]
    assert not left(tmp_path)
    word = base64.b64encode(f"{USER}:{PASSWORD}".encode())
    for path in filter(Path.is_file, (tmp_path / "cache").rglob("*")):
        assert PASSWORD.encode() not in path.read_bytes()
        assert word not in path.read_bytes()


async def test_layers_that_the_cache_has_are_not_fetched_again(
    tmp_path: Path, registry: Registry, image: BuiltImage
) -> None:
    other = write_layout(tmp_path / "other", [BASE, SECOND])
    registry.push(image.layout, "first:t")
    # In the format of Docker; the base has the same blob.
    registry.push(other.layout, "second:t", "--format=v2s2")
    async with opened(tmp_path, registry.address) as images:
        first = await images.obtain(named(registry, "first:t"), auth=registry.auth)
        registry.blob(image.blobs[0]).unlink()
        second = await images.obtain(named(registry, "second:t"), auth=registry.auth)
        assert second.layers[0].samefile(first.layers[0])
        tree = extract(second.metadata, second.layers, tmp_path / "tree")
        assert sorted(path.name for path in (tree / "etc").iterdir()) == ["base", "second"]
        base_bytes = first.layers[0].stat().st_blocks * 512
        assert await images.used_bytes() == first.size_bytes + second.size_bytes - base_bytes
        found = await images.get(named(registry, "first:t"))
        assert found is not None
        assert found.own_bytes == found.size_bytes - base_bytes

        assert await images.remove(second.digest)
        assert await images.get(named(registry, "second:t")) is None
        assert len(list((tmp_path / "cache/oci/layers").iterdir())) == 2
        assert [image.digest for image in (await images.prune(0)).images] == [first.digest]
        assert await images.used_bytes() == 0


async def test_a_tag_is_resolved_when_it_is_asked_for(tmp_path: Path, registry: Registry, image: BuiltImage) -> None:
    registry.push(image.layout, "moves:t")
    async with opened(tmp_path, registry.address) as images:
        before = await images.obtain(named(registry, "moves:t"), auth=registry.auth)
        moved = write_layout(tmp_path / "moved", [BASE, SECOND])
        registry.push(moved.layout, "moves:t")
        assert (await images.obtain(named(registry, "moves:t"))).digest == before.digest
        after = await images.obtain(named(registry, "moves:t"), auth=registry.auth, refresh=True)
        assert (before.digest, after.digest) == (image.digest, moved.digest)
        by_digest = named(registry, f"moves@{before.digest}")
        assert (await images.obtain(by_digest, auth=registry.auth)).digest == before.digest
        assert await images.remove_name(by_digest)
        assert await images.get(by_digest) is None
        assert await images.get(named(registry, "moves:t")) is not None


async def test_the_image_of_an_index_for_this_platform_is_used(
    tmp_path: Path, registry: Registry, image: BuiltImage
) -> None:
    layout = image.layout
    index = json.loads((layout / "index.json").read_text())
    (entry,) = index["manifests"]
    arm = write_layout(layout, [SECOND])
    entries = [
        {"mediaType": entry["mediaType"], "size": (layout / "blobs/sha256" / digest[7:]).stat().st_size,
         "digest": digest, "platform": {"os": "linux", "architecture": architecture}}
        for digest, architecture in ((arm.digest, "arm64"), (image.digest, "amd64"))
    ]  # fmt: skip
    write_layout(layout, [FIRST], index=entries)
    registry.push(layout, "many:t", "--all")
    async with opened(tmp_path, registry.address) as images:
        assert (await images.obtain(named(registry, "many:t"), auth=registry.auth)).digest == image.digest
        assert (await images.obtain(parse_reference(f"oci:{layout}:t"))).digest == image.digest


@pytest.mark.parametrize("transport", ["oci", "oci-archive", "docker-archive"])
async def test_images_of_files_are_used(tmp_path: Path, image: BuiltImage, transport: str) -> None:
    text = f"{transport}:{tmp_path}/file:{'app:t' if transport == 'docker-archive' else 't'}"
    reference = parse_reference(text)
    await trio.run_process(["skopeo", "copy", "--quiet", f"oci:{image.layout}:t", str(reference)])
    async with opened(tmp_path) as images:
        found = await images.obtain(reference)
        assert found.config.diff_ids == tuple(image.diff_ids)
        tree = extract(found.metadata, found.layers, tmp_path / "tree")
        assert (tree / "etc/first").read_bytes() == b"1"
        assert (await refused(images, parse_reference(f"{transport}:/nowhere:t"))).code == "image_not_found"
    assert not left(tmp_path)


async def test_a_layer_may_be_in_an_image_twice(tmp_path: Path) -> None:
    empty = tar()
    image = write_layout(tmp_path / "layout", [empty, BASE, empty, FIRST], kind="tar+zstd")
    async with opened(tmp_path) as images:
        found = await images.obtain(parse_reference(f"oci:{image.layout}:t"))
        assert found.layers[0].samefile(found.layers[2])
        assert found.own_bytes == found.size_bytes
        tree = extract(found.metadata, found.layers, tmp_path / "tree")
        assert sorted(path.name for path in (tree / "etc").iterdir()) == ["base", "first"]


@pytest.mark.parametrize("name", ["metadata.erofs", "correcting.erofs", "disk.vmdk", "0.erofs", "image.json"])
async def test_an_image_that_has_lost_a_file_is_fetched_again(tmp_path: Path, image: BuiltImage, name: str) -> None:
    reference = parse_reference(f"oci:{image.layout}:t")
    async with opened(tmp_path) as images:
        found = await images.obtain(reference)
        found.metadata.with_name(name).unlink()
        again = await images.obtain(reference)
        assert again == msgspec.structs.replace(found, used_at=again.used_at)
        assert extract(again.metadata, again.layers, tmp_path / "tree").is_dir()


async def test_a_file_that_has_changed_is_another_image(tmp_path: Path, image: BuiltImage) -> None:
    async with opened(tmp_path) as images:
        reference = parse_reference(f"oci:{image.layout}:t")
        before = await images.obtain(reference)
        changed = write_layout(image.layout, [BASE, SECOND])
        after = await images.obtain(reference)
        assert (before.digest, after.digest) == (image.digest, changed.digest)
        assert after.layers[0].samefile(before.layers[0])


async def test_an_image_has_many_layers(tmp_path: Path, registry: Registry) -> None:
    layers = [
        tar((f"f{number}", {"data": os.urandom(2000)}), ("last", {"data": b"%d" % number})) for number in range(40)
    ]
    image = write_layout(tmp_path / "layout", layers)
    registry.push(image.layout, "many-layers:t")
    async with opened(tmp_path, registry.address) as images:
        found = await images.obtain(named(registry, "many-layers:t"), auth=registry.auth)
    assert len(found.layers) == 40
    tree = extract(found.metadata, found.layers, tmp_path / "tree")
    assert len(list(tree.iterdir())) == 41
    assert (tree / "last").read_bytes() == b"39"


async def test_layers_are_converted_while_others_arrive(tmp_path: Path, image: BuiltImage) -> None:
    def wait(request: BaseHTTPRequestHandler) -> bool:
        if request.path.endswith(image.blobs[1]):
            server.released.wait(60)
        return False

    with FailingRegistry(image.layout, wait) as server:
        async with opened(tmp_path, server.address) as images:
            await images.resolve(named(server))
            (pull,) = images.pulls()
            with trio.fail_after(60):
                while pull.report.layers_done != 1:
                    await trio.lowlevel.checkpoint()
                assert (pull.report.phase, pull.report.layers_total) == ("fetching", 2)
                server.released.set()
                assert (await images.obtain(named(server))).digest == image.digest


async def test_a_layer_that_can_not_be_converted_ends_the_fetch_of_the_others(tmp_path: Path) -> None:
    image = write_layout(tmp_path / "layout", [tar(("dev", {"type": tarfile.CHRTYPE})), FIRST])

    def wait(request: BaseHTTPRequestHandler) -> bool:
        if request.path.endswith(image.blobs[1]):
            server.released.wait(60)
        return False

    with FailingRegistry(image.layout, wait) as server:
        async with opened(tmp_path, server.address) as images:
            assert (await refused(images, named(server))).code == "image_invalid"
            assert not server.released.is_set()
    assert not left(tmp_path)


# Failures


async def test_what_a_registry_refuses_says_what_to_do(tmp_path: Path, registry: Registry, image: BuiltImage) -> None:
    registry.push(image.layout, "private:t")
    wrong = auth_file(registry.address, "wrong")
    async with opened(tmp_path, registry.address) as images:
        for name, auth, code, says in (
            ("private:t", None, "image_unauthorized", "docker login"),
            ("private:t", wrong, "image_unauthorized", "docker login"),
            ("private:other", registry.auth, "image_not_found", "check name and tag"),
            ("nothing:t", registry.auth, "image_not_found", "check name and tag"),
        ):
            error = await refused(images, named(registry, name), auth)
            assert error.code == code
            assert says in error.hint
            assert f"{registry.address}/{name}" in error.message
    assert not left(tmp_path)


async def test_damaged_and_missing_blobs_leave_nothing(tmp_path: Path, registry: Registry) -> None:
    layer = tar(("unique", {"data": os.urandom(5000)}))
    image = write_layout(tmp_path / "layout", [layer, FIRST])
    registry.push(image.layout, "damaged:t")
    blob = registry.blob(image.blobs[0])
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    async with opened(tmp_path, registry.address) as images:
        assert (await refused(images, named(registry, "damaged:t"), registry.auth)).code == "image_mismatch"
        blob.unlink()
        assert (await refused(images, named(registry, "damaged:t"), registry.auth)).code == "fetch_interrupted"
        assert await images.all() == []
        assert await images.used_bytes() == 0
    assert not left(tmp_path)


async def test_plain_http_has_to_be_allowed(tmp_path: Path, registry: Registry) -> None:
    async with opened(tmp_path) as images:
        error = await refused(images, named(registry), registry.auth)
        assert error.code == "registry_unreachable"
        assert "oci_plain_http" in error.hint
        error = await refused(images, parse_reference("127.0.0.1:1/app"))
        assert error.code == "registry_unreachable"


def is_layer(image: BuiltImage, request: BaseHTTPRequestHandler) -> bool:
    return request.path.endswith(image.blobs[0])


def busy(request: BaseHTTPRequestHandler) -> bool:
    answer(request, 429, b"{}", Retry_After=1)
    return True


def broken(request: BaseHTTPRequestHandler) -> bool:
    answer(request, 503)
    return True


@pytest.mark.parametrize(
    ("fails", "code", "says"), [(busy, "registry_busy", "wait a while"), (broken, "registry_unreachable", "network")]
)
async def test_a_registry_that_can_not_answer_now_says_so(
    tmp_path: Path, image: BuiltImage, fails: Callable[[BaseHTTPRequestHandler], bool], code: str, says: str
) -> None:
    with FailingRegistry(image.layout, fails) as server:
        async with opened(tmp_path, server.address) as images:
            error = await refused(images, named(server))
            assert error.code == code
            assert says in error.hint
            # It was asked again after the pause that it asked for.
            assert fails is broken or len(server.requests) > 1


async def test_a_blob_that_stalls_ends_with_a_reason(tmp_path: Path, image: BuiltImage) -> None:
    def stall(request: BaseHTTPRequestHandler) -> bool:
        if not is_layer(image, request):
            return False
        answer(request, 200, None, Content_Length=10**6)
        request.wfile.write(b"x" * 5000)
        request.wfile.flush()
        server.released.wait(60)
        request.close_connection = True
        return True

    with FailingRegistry(image.layout, stall) as server:
        async with opened(tmp_path, server.address, stalled_s=1.5) as images:
            error = await refused(images, named(server))
    assert error.code == "fetch_stalled"
    assert "nothing has arrived for 1.5 s" in error.message
    assert not left(tmp_path)


async def test_a_registry_that_dies_half_way_ends_with_a_reason_and_a_retry_helps(
    tmp_path: Path, image: BuiltImage
) -> None:
    deaths = [True, True, True]

    def die(request: BaseHTTPRequestHandler) -> bool:
        if not is_layer(image, request) or not deaths:
            return False
        deaths.pop()
        answer(request, 200, None, Content_Length=10**6)
        request.wfile.write(b"x" * 5000)
        request.close_connection = True
        return True

    with FailingRegistry(image.layout, die) as server:
        async with opened(tmp_path, server.address) as images:
            assert (await refused(images, named(server))).code == "fetch_interrupted"
        assert not left(tmp_path)
        async with opened(tmp_path, server.address, retries=3) as images:
            assert (await images.obtain(named(server))).digest == image.digest


async def test_a_registry_that_sends_more_than_it_promises_is_stopped(tmp_path: Path, image: BuiltImage) -> None:
    def flood(request: BaseHTTPRequestHandler) -> bool:
        if not is_layer(image, request):
            return False
        answer(request, 200, None)
        request.close_connection = True
        try:
            while not server.released.is_set():
                request.wfile.write(bytes(2**20))
                server.released.wait(0.001)
        except OSError:
            pass
        return True

    with FailingRegistry(image.layout, flood) as server:
        async with opened(tmp_path, server.address) as images:
            error = await refused(images, named(server))
    assert error.code == "image_too_large"
    assert not left(tmp_path)


async def test_a_full_cache_says_so(tmp_path: Path, image: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volant.store._files._RESERVE_BYTES", 2**60)
    async with opened(tmp_path) as images:
        error = await refused(images, parse_reference(f"oci:{image.layout}:t"))
    assert error.code == "cache_full"
    assert "make room" in error.hint
    assert not left(tmp_path)


@as_root
async def test_a_disk_that_fills_up_in_a_fetch_keeps_nothing_and_the_next_fetch_succeeds(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if others filled it after the check.
    monkeypatch.setattr("volant.store._files._RESERVE_BYTES", 0)
    layer = os.urandom(12 * 2**20)
    built = write_layout(tmp_path / "layout", [BASE, tar(("data", {"data": layer}))], kind="tar+zstd")
    registry.push(built.layout, "full:t")
    with small_disk(tmp_path / "cache", size_mb=8) as cache:
        async with opened(tmp_path, registry.address) as images:
            error = await refused(images, named(registry, "full:t"), registry.auth)
            assert (error.code, "make room" in error.hint) == ("cache_full", True), error
            assert not left(tmp_path)
            assert not list(cache.rglob("*.erofs"))
            await trio.run_process(["mount", "-o", "remount,size=600m", str(cache)])
            found = await images.obtain(named(registry, "full:t"), auth=registry.auth)
            assert (extract(found.metadata, found.layers, tmp_path / "tree") / "data").read_bytes() == layer


async def test_a_missing_program_says_how_to_install_it(
    tmp_path: Path, image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, package in (("_skopeo", "skopeo"), ("_fetch", "erofs-utils")):
        with pytest.MonkeyPatch.context() as patch:
            if module == "_skopeo":
                patch.setattr("volant.oci._skopeo.PROGRAM", "no-such-program")
            else:
                patch.setattr("volant.oci._fetch.PROGRAM_ENVIRONMENT", {"PATH": str(tmp_path)})
            async with opened(tmp_path) as images:
                error = await refused(images, parse_reference(f"oci:{image.layout}:t"))
        assert error.code == "program_missing"
        assert error.hint == f"on Debian: `sudo apt install {package}`"


# At the same time


async def test_many_waiters_share_one_fetch_and_the_last_one_cancels_it(tmp_path: Path, image: BuiltImage) -> None:
    asked, token = trio.Event(), trio.lowlevel.current_trio_token()
    hold = [True]

    def wait(request: BaseHTTPRequestHandler) -> bool:
        if is_layer(image, request) and hold:
            token.run_sync_soon(asked.set)
            server.released.wait(60)
        return False

    with FailingRegistry(image.layout, wait) as server:
        async with opened(tmp_path, server.address) as images:
            results: list[str] = []

            async def ask(scope: trio.CancelScope) -> None:
                with scope:
                    results.append((await images.obtain(named(server))).digest)

            with trio.fail_after(60):
                async with trio.open_nursery() as nursery:
                    scopes = [trio.CancelScope() for _ in range(5)]
                    for scope in scopes:
                        nursery.start_soon(ask, scope)
                    await asked.wait()
                    (state,) = images.pulls()
                    assert (state.report.phase, state.waiting) == ("fetching", 5)
                    for scope in scopes[:4]:
                        scope.cancel()
                    await trio.testing.wait_all_tasks_blocked()
                    assert images.pulls()[0].waiting == 1
                    server.released.set()
                assert results == [image.digest]
                assert sum(path.endswith(image.blobs[0]) for path in server.requests) == 1

                await images.remove(image.digest)
                server.released.clear()
                asked = trio.Event()
                async with trio.open_nursery() as nursery:
                    scope = trio.CancelScope()
                    nursery.start_soon(ask, scope)
                    await asked.wait()
                    scope.cancel()
            assert images.pulls() == []
        assert await trio.to_thread.run_sync(left, tmp_path) == []


def programs_in(directory: Path) -> dict[int, str]:
    """Returns the command lines of processes that work in a directory, by pid."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # What follows the path of a directory that was removed does not matter.
                if (entry / "cwd").readlink().is_relative_to(directory):
                    found[int(entry.name)] = (entry / "cmdline").read_text()
            except OSError:
                continue
    return {pid: command for pid, command in found.items() if command}


async def test_kill_9_leaves_nothing_partial(tmp_path: Path, image: BuiltImage) -> None:
    program = """
import sys, trio
from pathlib import Path
from tests.oci.test_images import opened
from volant.oci import parse_reference
async def main():
    async with opened(Path(sys.argv[1]), sys.argv[2]) as images:
        await images.obtain(parse_reference(sys.argv[2] + "/app:t"), auth=b'{"auths":{"x":{"auth":"eDp5"}}}')
trio.run(main)
"""
    asked, token = trio.Event(), trio.lowlevel.current_trio_token()

    def wait(request: BaseHTTPRequestHandler) -> bool:
        if is_layer(image, request):
            token.run_sync_soon(asked.set)
            server.released.wait(60)
        return False

    with FailingRegistry(image.layout, wait) as server:
        process = await trio.lowlevel.open_process([sys.executable, "-c", program, str(tmp_path), server.address])
        with trio.fail_after(60):
            await asked.wait()
        process.kill()
        await process.wait()
        assert len(left(tmp_path)) == 2
        running = programs_in(tmp_path)
        assert any("skopeo" in command for command in running.values())
        async with opened(tmp_path, server.address) as images:
            assert not left(tmp_path)
            with trio.fail_after(20):
                while programs_in(tmp_path).keys() & running.keys():  # noqa: ASYNC110 - they are not our children
                    await trio.sleep(0.02)
            assert await images.all() == []
            server.released.set()
            assert (await images.obtain(named(server))).digest == image.digest
    assert not left(tmp_path)
