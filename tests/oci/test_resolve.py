"""An image is known before its layers are there, and what comes later needs no credentials."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing

from tests.oci.kit import BuiltImage, tar, write_layout
from tests.oci.registry import PASSWORD, USER, FailingRegistry, auth_file, needs_registry
from tests.oci.test_images import BASE, FIRST, SECOND, image, left, named, opened
from tests.web_server import answer
from volant.host import Host
from volant.oci import ImageService, ImageSettings, OciError, OciImages, parse_reference

__all__ = ["image"]

pytestmark = [pytest.mark.programs, needs_registry]

_WORD = f"Basic {base64.b64encode(f'{USER}:{PASSWORD}'.encode()).decode()}"


class Held:
    """A registry that asks for credentials, and that keeps layers until the test releases them."""

    def __init__(self, image: BuiltImage) -> None:
        self._image = image
        self._token = trio.lowlevel.current_trio_token()
        self.asked = trio.Event()
        self.server = FailingRegistry(image.layout, self._decide)
        self.auth = auth_file(self.server.address, PASSWORD)

    def _decide(self, request: BaseHTTPRequestHandler) -> bool:
        if request.headers["Authorization"] != _WORD:
            answer(request, 401, b"{}", WWW_Authenticate='Basic realm="tests"')
            return True
        if request.path.endswith(self._image.blobs[0]):
            self._token.run_sync_soon(self.asked.set)
            self.server.released.wait(60)
        return False

    @property
    def layers_sent(self) -> int:
        return sum(path.endswith(self._image.blobs[0]) for path in self.server.requests)


@contextmanager
def held(image: BuiltImage) -> Iterator[Held]:
    found = Held(image)
    with found.server:
        yield found


async def ended(images: OciImages) -> None:
    """Waits until no fetch is under way."""
    with trio.fail_after(60):
        for fetch in list(images._under_way.values()):
            await fetch.done.wait()


async def test_an_image_is_known_before_its_layers_are_there(tmp_path: Path, image: BuiltImage) -> None:
    with held(image) as registry, trio.fail_after(60):
        async with opened(tmp_path, registry.server.address) as images:
            reference = named(registry.server)
            found = await images.resolve(reference, auth=registry.auth)
            assert (found.reference, found.digest) == (str(reference), image.digest)
            assert found.config.cmd == ("first",)
            assert found.total_bytes == sum(
                (image.layout / "blobs/sha256" / blob.removeprefix("sha256:")).stat().st_size for blob in image.blobs
            )
            await registry.asked.wait()
            assert images.pulls()[0].waiting == 0
            registry.server.released.set()
            # Without credentials: the fetch has them.
            whole = await images.obtain_digest(found.digest, reference)
            assert whole.digest == image.digest
            assert registry.layers_sent == 1


async def test_an_image_in_the_cache_is_known_without_the_network(tmp_path: Path, image: BuiltImage) -> None:
    with held(image) as registry:
        registry.server.released.set()
        async with opened(tmp_path, registry.server.address) as images:
            reference = named(registry.server)
            await images.obtain(reference, auth=registry.auth)
            asked = len(registry.server.requests)
            found = await images.resolve(reference)
            assert (found.digest, found.total_bytes) == (image.digest, 0)
            await images.obtain_digest(found.digest, reference)
            assert len(registry.server.requests) == asked
            again = await images.resolve(reference, auth=registry.auth, refresh=True)
            await ended(images)
            assert (again.digest, again.total_bytes) == (image.digest, 0)
            assert registry.layers_sent == 1
            with pytest.raises(OciError) as caught:
                await images.resolve(reference, refresh=True)
            assert caught.value.code == "image_unauthorized"


async def test_clients_with_credentials_of_their_own_share_the_layers(tmp_path: Path, image: BuiltImage) -> None:
    with held(image) as registry, trio.fail_after(60):
        async with opened(tmp_path, registry.server.address) as images:
            reference = named(registry.server)
            await images.resolve(reference, auth=registry.auth)
            await images.resolve(reference, auth=registry.auth)
            with pytest.raises(OciError):
                await images.resolve(reference, auth=auth_file(registry.server.address, "wrong"))
            await registry.asked.wait()
            registry.server.released.set()
            await ended(images)
            assert registry.layers_sent == 1
            assert (await images.obtain(reference)).digest == image.digest


async def test_a_fetch_that_nobody_waits_for_ends_after_a_while(
    tmp_path: Path, image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volant.oci._images._UNATTENDED_S", 0.2)
    with held(image) as registry, trio.fail_after(60):
        async with opened(tmp_path, registry.server.address) as images:
            await images.resolve(named(registry.server), auth=registry.auth)
            await ended(images)
            assert images.pulls() == []
    assert await trio.to_thread.run_sync(left, tmp_path) == []


async def test_a_client_that_leaves_before_the_answer_ends_the_fetch(tmp_path: Path, image: BuiltImage) -> None:
    with held(image) as registry, trio.fail_after(60):
        async with opened(tmp_path, registry.server.address) as images:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(images.resolve, named(registry.server))
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            await ended(images)
            assert images.pulls() == []


async def test_a_removed_image_is_fetched_again_by_its_digest(tmp_path: Path, image: BuiltImage) -> None:
    with FailingRegistry(image.layout, lambda request: False) as server:
        async with opened(tmp_path, server.address) as images:
            reference = named(server)
            found = await images.resolve(reference)
            await images.obtain_digest(found.digest, reference)
            assert await images.remove(found.digest)
            # The tag may lead elsewhere by now.
            del server.requests[:]
            assert (await images.obtain_digest(found.digest, reference)).digest == image.digest
            assert not any(path.endswith("/t") for path in server.requests)


async def test_a_file_that_has_changed_is_refused(tmp_path: Path, image: BuiltImage) -> None:
    reference = parse_reference(f"oci:{image.layout}:t")
    async with opened(tmp_path) as images:
        found = await images.resolve(reference)
        assert (await images.obtain_digest(found.digest, reference)).digest == image.digest
        await images.remove(found.digest)
        write_layout(image.layout, [BASE, SECOND])
        with pytest.raises(OciError, match="by now, not") as caught:
            await images.obtain_digest(found.digest, reference)
        assert caught.value.code == "image_changed"


async def test_too_large_an_image_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    image = write_layout(tmp_path / "layout", [tar(("a", {"data": BASE})), FIRST])
    with FailingRegistry(image.layout, lambda request: False) as server:
        async with opened(tmp_path, server.address, max_bytes=1000) as images:
            with pytest.raises(OciError) as caught:
                await images.resolve(named(server))
            assert caught.value.code == "image_too_large"
            assert not any(path.endswith(image.blobs[0]) for path in server.requests)


async def test_the_number_of_fetches_is_bounded(
    tmp_path: Path, image: BuiltImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volant.oci._images._MAX_FETCHES", 2)
    with held(image) as registry, trio.fail_after(60):
        async with opened(tmp_path, registry.server.address) as images:
            for _ in range(2):
                await images.resolve(named(registry.server), auth=registry.auth)
            with pytest.raises(OciError) as caught:
                await images.resolve(named(registry.server), auth=registry.auth)
            assert caught.value.code == "too_many_fetches"


# The daemon's


async def test_a_service_opens_the_cache_with_its_first_use(tmp_path: Path, image: BuiltImage) -> None:
    for name in ("cache", "run"):
        (tmp_path / name).mkdir()
    leftover = tmp_path / "cache" / "oci" / "work" / "x.new"
    leftover.mkdir(parents=True)
    service = ImageService(Host(), ImageSettings(cache_dir=tmp_path / "cache", runtime_dir=tmp_path / "run"))
    with pytest.raises(OciError) as caught:
        await service.resolve("app", "default")
    assert caught.value.code == "images_stopped"
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: service.keep(task_status=task_status))
        assert service.pulls() == []
        assert leftover.exists()
        with trio.fail_after(60):
            found = await service.resolve(f"oci:{image.layout}:t", "default")
            assert not leftover.exists()
            assert (await service.obtain_digest(found.digest, found.reference, "default")).digest == image.digest
        with pytest.raises(OciError) as caught:
            await service.resolve("NOT A REFERENCE", "default")
        assert caught.value.code == "bad_reference"
        nursery.cancel_scope.cancel()
    with pytest.raises(OciError) as caught:
        await service.obtain_digest(image.digest, "app", "default")
    assert caught.value.code == "images_stopped"


async def test_a_service_without_a_usable_cache_says_so_and_tries_again(tmp_path: Path, image: BuiltImage) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "cache").write_text("")
    settings = ImageSettings(cache_dir=tmp_path / "cache", runtime_dir=tmp_path / "run")
    service = ImageService(Host(), msgspec.structs.replace(settings, timeout_s=60.0))
    async with trio.open_nursery() as nursery:
        await nursery.start(lambda task_status: service.keep(task_status=task_status))
        with trio.fail_after(60):
            with pytest.raises(OciError, match="the cache can't be written"):
                await service.resolve(f"oci:{image.layout}:t", "default")
            (tmp_path / "cache").unlink()
            assert (await service.resolve(f"oci:{image.layout}:t", "default")).digest == image.digest
        nursery.cancel_scope.cancel()
