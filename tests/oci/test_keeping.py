"""Which images stay in the cache, and which go; how far a fetch is."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.oci.kit import needs_erofs, tar, write_layout
from tests.oci.test_images import BASE, opened
from volant.oci import AMD64, CachedImage, ImageConfig, ImageUser, OciError, OciImages, Report, parse_reference
from volant.oci._prune import surplus


def cached(name: str, used_at: float, **layers: int) -> CachedImage:
    config = ImageConfig(platform=AMD64, diff_ids=tuple(layers))
    size = 1 + sum(layers.values())
    return CachedImage(
        digest=name, config=config, metadata=Path(), disk=Path(), layers=(), names=(), size_bytes=size, own_bytes=size,
        used_at=used_at, layer_bytes=tuple(layers.values()),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("limit", "stay", "gone", "freed"),
    [
        (1000, "", "", 0),
        (163, "", "", 0),
        (162, "", "a", 11),
        (152, "", "a", 11),
        (151, "", "ab", 12 + 50 + 100),
        (0, "", "abc", 163),
        (0, "b", "ac", 12),
        (0, "c", "ab", 162),
        (151, "a", "b", 51),
    ],
)
def test_the_least_recently_used_images_go_until_the_rest_fits(limit: int, stay: str, gone: str, freed: int) -> None:
    images = [cached("c", 3), cached("a", 1, base=100, own=10), cached("b", 2, base=100, other=50)]
    found = surplus(images, limit, lambda image: image.digest not in stay)
    assert ("".join(image.digest for image in found[0]), found[1]) == (gone, freed)


async def test_progress_is_reported_a_bounded_number_of_times() -> None:
    steps = []
    report = Report(on_step=lambda: steps.append(report.done_bytes))
    report.begin(1000, 1)
    for done in range(0, 1500, 7):
        report.count(done)
    assert len(steps) == 19
    assert (steps[0], report.done_bytes) == (56, 1000)
    assert report.bytes_per_s == 0.0


@pytest.mark.programs
@needs_erofs
async def test_images_that_do_not_fit_any_more_go_after_a_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("volant.oci._images._UNATTENDED_S", 0.0)
    users: dict[str, list[ImageUser]] = {}
    layers = [tar(("x", {"data": BASE})), *(tar((str(number), {})) for number in range(4))]
    layouts = [write_layout(tmp_path / str(number), [layers[0], layers[number + 1]]) for number in range(4)]
    async with opened(tmp_path, options={"max_cache_bytes": 100_000, "users": lambda: users}) as images:
        for number, image in enumerate(layouts):
            found = await images.obtain(parse_reference(f"oci:{image.layout}:t"))
            if number == 0:
                users[found.digest] = [ImageUser("default", "VM web")]
            # The newest stays: its VM may have no row yet.
            await until_kept(images, {layouts[0].digest, layouts[number].digest})
        with pytest.raises(OciError, match="VM web") as caught:
            await images.remove(layouts[0].digest)
        assert caught.value.code == "image_in_use"


async def until_kept(images: OciImages, digests: set[str]) -> None:
    with trio.fail_after(30):
        while {image.digest for image in await images.all()} != digests:
            await trio.lowlevel.checkpoint()


@pytest.mark.programs
@needs_erofs
async def test_an_image_that_another_daemon_uses_stays(tmp_path: Path) -> None:
    image = write_layout(tmp_path / "layout", [BASE])
    reference = parse_reference(f"oci:{image.layout}:t")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for directory in (ours, theirs):
        directory.mkdir()
    users = {image.digest: [ImageUser("default", "VM web")]}
    async with (
        opened(tmp_path, options={"owner": theirs, "users": lambda: users}) as other,
        opened(tmp_path, options={"owner": ours}) as images,
    ):
        await images.obtain_digest(image.digest, reference)
        await other.obtain_digest(image.digest, reference)
        assert (await images.prune(0)).images == []
        with pytest.raises(OciError, match=f"the daemon of {theirs}"):
            await images.remove(image.digest)
        # The VM is gone.
        users.clear()
        await other.prune(2**40)
        assert [one.digest for one in (await images.prune(0)).images] == [image.digest]

        await other.obtain_digest(image.digest, reference)
        # A daemon without a state directory does not come back.
        theirs.rmdir()
        assert [one.digest for one in (await images.prune(0)).images] == [image.digest]
        assert not list((tmp_path / "cache" / "oci" / "users").iterdir())
