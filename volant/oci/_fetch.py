"""One fetch: from a reference to an image in the cache."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import trio

from volant.host import PROGRAM_ENVIRONMENT, Host

from ._config import ImageConfig, parse_config
from ._errors import OciError
from ._job import ImageJob, check_end
from ._layers import LayerJob
from ._manifest import MAX_DOCUMENT_BYTES, Descriptor, Index, Manifest, Platform, digest_of, parse_manifest
from ._reference import Reference
from ._skopeo import Skopeo
from ._store import CachedImage, Store, Work, disk_errors

_PARENT = Path(__file__).resolve().parents[2]
"""The process that converts must import this very package."""


@dataclass(frozen=True)
class FetchLimits:
    """How long a fetch may take, and how much it may bring."""

    timeout_s: float = 1800.0
    """For everything: waiting for other fetches, fetch, conversion."""
    max_bytes: int = 64 * 1024**3
    """Of the layers of an image, as they are fetched."""


@dataclass
class Report:
    """How far a fetch is."""

    phase: str = "waiting"
    """Then `resolving`, `fetching`, `converting`."""
    done_bytes: int = 0
    total_bytes: int = 0
    """Of the layers that the cache lacks, as they are fetched; 0: not known."""


async def fetch_image(
    host: Host,
    store: Store,
    skopeo: Skopeo,
    reference: Reference,
    auth: Path,
    work: Work,
    *,
    limits: FetchLimits,
    platform: Platform,
    report: Report,
) -> CachedImage:
    """Returns an image that is in the cache then. The caller sets the deadline, and removes `work`.

    :raises OciError:
    """

    def count(written: int) -> None:
        report.done_bytes = written

    report.phase = "resolving"
    if reference.transport == "docker":
        data, manifest = await _resolve(skopeo, reference, auth, work, platform)
        digest = digest_of(data)
        if (found := await trio.to_thread.run_sync(store.find, digest)) is None:
            source = reference.with_digest(digest)
            document = await skopeo.inspect(source, work.path, auth, config=True)
            config = parse_config(_checked(document, manifest.config), manifest, platform)
            held = await trio.to_thread.run_sync(store.hold, work, config.diff_ids)
            await trio.to_thread.run_sync(_put_placeholders, work, manifest, held)
            missing = {layer for number, layer in enumerate(manifest.layers) if number not in held}
            report.total_bytes = sum(layer.size for layer in missing)
            if report.total_bytes > limits.max_bytes:
                raise OciError(
                    "image_too_large", f"{reference} has layers of {report.total_bytes // 2**20} MiB, at most "
                    f"{limits.max_bytes // 2**20} are allowed", "use a smaller image",
                )  # fmt: skip
            report.phase = "fetching"
            await skopeo.copy(
                source, work.layout, auth, platform=platform, max_bytes=report.total_bytes, progress=count
            )
    else:
        # A file may contain several images, and skopeo chooses.
        report.phase = "fetching"
        await skopeo.copy(reference, work.layout, auth, platform=platform, max_bytes=limits.max_bytes, progress=count)
        digest, manifest, config = await trio.to_thread.run_sync(_read_layout, work, platform)
        if (found := await trio.to_thread.run_sync(store.find, digest)) is None:
            held = await trio.to_thread.run_sync(store.hold, work, config.diff_ids)
    if found is None:
        report.phase = "converting"
        await _convert(host, work, manifest, config, held)
        await trio.to_thread.run_sync(store.commit, work, digest, config)
    await trio.to_thread.run_sync(store.note, reference, digest)
    found = await trio.to_thread.run_sync(lambda: store.find(digest, use=True))
    if found is None:
        raise OciError("io_error", f"{reference} was stored and can't be read back", "check the cache's disk")
    return found


async def _resolve(
    skopeo: Skopeo, reference: Reference, auth: Path, work: Work, platform: Platform
) -> tuple[bytes, Manifest]:
    """Returns the manifest for a platform that a registry has under a reference, as bytes and read."""
    data = await skopeo.inspect(reference, work.path, auth)
    if reference.digest and digest_of(data) != reference.digest:
        raise _mismatch(f"the manifest of {reference} has the digest {digest_of(data)}")
    document = parse_manifest(data)
    if isinstance(document, Index):
        entry = document.choose(platform)
        data = _checked(await skopeo.inspect(reference.with_digest(entry.digest), work.path, auth), entry)
        document = parse_manifest(data)
    if not isinstance(document, Manifest):
        raise OciError("image_unsupported", f"{reference} is an index of indexes", "name a manifest by its digest")
    return data, document


def _checked(data: bytes, described: Descriptor) -> bytes:
    if digest_of(data) != described.digest or len(data) != described.size:
        raise _mismatch(
            f"a document should be {described.digest} with {described.size} bytes, and is {digest_of(data)} with "
            f"{len(data)}"
        )
    return data


def _put_placeholders(work: Work, manifest: Manifest, held: set[int]) -> None:
    """Makes files without content, so that skopeo does not fetch the layers that the cache has. Blocks."""
    with disk_errors():
        work.blob("").mkdir(parents=True)
        needed = {layer.digest for number, layer in enumerate(manifest.layers) if number not in held}
        for number in held:
            layer = manifest.layers[number]
            if layer.digest not in needed:
                with work.blob(layer.digest).open("wb") as file:
                    file.truncate(layer.size)


def _read_layout(work: Work, platform: Platform) -> tuple[str, Manifest, ImageConfig]:
    """Returns the only image of a layout that skopeo has written. Blocks."""
    with disk_errors():
        index = parse_manifest(_read(work.layout / "index.json"))
        assert isinstance(index, Index)
        (entry,) = index.manifests
        manifest = parse_manifest(_checked(_read(work.blob(entry.digest)), entry))
        if not isinstance(manifest, Manifest):
            raise OciError("image_unsupported", "the file has an index of indexes", "copy one image out of it")
        document = _checked(_read(work.blob(manifest.config.digest)), manifest.config)
        return entry.digest, manifest, parse_config(document, manifest, platform)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_DOCUMENT_BYTES + 1)


async def _convert(host: Host, work: Work, manifest: Manifest, config: ImageConfig, held: set[int]) -> None:
    """Converts the layers that are not held, and joins all, in a process of its own."""
    first = {diff_id: number for number, diff_id in reversed(list(enumerate(config.diff_ids)))}
    todo = [
        LayerJob(
            blob=str(work.blob(layer.digest)),
            digest=layer.digest,
            size=layer.size,
            diff_id=diff_id,
            target=str(work.layer(number)),
        )
        for number, (layer, diff_id) in enumerate(zip(manifest.layers, config.diff_ids, strict=True))
        # The same layer may be in an image twice.
        if number not in held and first[diff_id] == number
    ]
    layers = tuple(str(work.layer(first[diff_id])) for diff_id in config.diff_ids)
    job = ImageJob(tuple(todo), layers, str(work.metadata))
    environment = {**PROGRAM_ENVIRONMENT, "PYTHONPATH": str(_PARENT), "TMPDIR": str(work.path)}
    status, output = await host.processes.run(
        [sys.executable, "-P", "-m", "volant.oci"],
        env=environment,
        cwd=work.path,
        timeout_s=float("inf"),
        stdin=msgspec.json.encode(job),
    )
    check_end(status, output)
    await trio.to_thread.run_sync(_link_repeated, work, config, first)


def _link_repeated(work: Work, config: ImageConfig, first: dict[str, int]) -> None:
    with disk_errors():
        for number, diff_id in enumerate(config.diff_ids):
            if not work.layer(number).exists():
                os.link(work.layer(first[diff_id]), work.layer(number))


def _mismatch(what: str) -> OciError:
    return OciError("image_mismatch", what, "fetch it again; if it stays, the registry or a mirror is damaged")
