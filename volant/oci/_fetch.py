"""One fetch: from a reference to an image in the cache."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Awaitable, Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import trio

from volant.host import PROGRAM_ENVIRONMENT, Host, as_user
from volant.store import disk_errors

from ._config import ImageConfig, parse_config
from ._errors import OciError
from ._isolation import open_theirs
from ._job import Confinement, ImageJob, check_end
from ._layers import LayerJob
from ._manifest import MAX_DOCUMENT_BYTES, Descriptor, Index, Manifest, Platform, digest_of, parse_manifest
from ._reference import Reference
from ._report import Report
from ._skopeo import Rights, Skopeo
from ._store import Store, Work, first_numbers

T = TypeVar("T")
_PARENT = Path(__file__).resolve().parents[2]
"""The directory from which the converting process imports this package."""


class FetchLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The limits of a fetch."""

    timeout_s: float = 1800.0
    """Maximum time for everything: waiting for other fetches, fetch, conversion."""
    max_bytes: int = 64 * 1024**3
    """Maximum size of an image's layers, as fetched."""


class Resolved(msgspec.Struct, frozen=True, kw_only=True):
    """A known and checked image, except for its layers."""

    reference: str
    """The complete reference, in the form of `parse_reference`."""
    digest: str
    """The digest of its manifest, as `sha256:…`."""
    config: ImageConfig
    total_bytes: int = 0
    """The size of the layers that the cache lacks, as fetched; 0 if the image is in the cache."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """The target of a reference, found by a fetch."""

    source: Reference
    """The place of the layers."""
    digest: str
    manifest: Manifest
    config: ImageConfig
    total_bytes: int
    """See `Resolved`."""
    is_cached: bool


class Fetcher(msgspec.Struct, frozen=True, kw_only=True):
    """Fetches images into a cache. The caller sets deadlines, and removes working directories."""

    host: Host
    store: Store
    skopeo: Skopeo
    limits: FetchLimits
    platform: Platform

    async def resolve(self, reference: Reference, rights: Rights, work: Work, report: Report) -> Target:
        """Returns the checked target of a reference. For a file it also copies the layers, as the file may contain
        several images, and skopeo chooses.

        :raises OciError: it can't be resolved.
        """
        if reference.transport == "docker":
            report.phase = "resolving"
            data, manifest = await _resolve(self.skopeo, reference, rights, work, self.platform)
            source = reference.with_digest(digest_of(data))
            found = await trio.to_thread.run_sync(self.store.find, source.digest)
            if found is not None:
                return Target(
                    source=source, digest=source.digest, manifest=manifest, config=found.config, total_bytes=0,
                    is_cached=True,
                )  # fmt: skip
            document = await self.skopeo.inspect(source, work.scratch, rights, config=True)
            config = parse_config(_checked(document, manifest.config), manifest, self.platform)
            total = _missing(manifest, await trio.to_thread.run_sync(self.store.having, config.diff_ids))
            self._check_size(reference, total)
            return Target(
                source=source, digest=source.digest, manifest=manifest, config=config, total_bytes=total,
                is_cached=False,
            )  # fmt: skip
        await self._copy(await self._readable(reference, work), rights, work, report, self.limits.max_bytes)
        digest, manifest, config = await self._as_skopeo(partial(_read_layout, work, self.platform))
        is_cached = await trio.to_thread.run_sync(self.store.find, digest) is not None
        total = sum(layer.size for layer in manifest.layers)
        return Target(
            source=reference, digest=digest, manifest=manifest, config=config, total_bytes=0 if is_cached else total,
            is_cached=is_cached,
        )  # fmt: skip

    async def fetch(self, target: Target, rights: Rights, work: Work, report: Report) -> None:
        """Fetches an image with its layers into the cache. :raises OciError: it failed."""
        manifest, config = target.manifest, target.config
        held = await trio.to_thread.run_sync(self.store.hold, work, config.diff_ids)
        first = first_numbers(config.diff_ids)
        new = {first[diff_id] for number, diff_id in enumerate(config.diff_ids) if number not in held}
        made = await trio.to_thread.run_sync(self.store.begin, work, new)
        convert = partial(self._convert, work, manifest, config, made, new, report)
        if target.source.transport == "docker":
            await self._as_skopeo(partial(_put_placeholders, work, manifest, held))
            total = _missing(manifest, held)
            self._check_size(target.source, total)
            report.begin(total, len(manifest.layers) - len(held))

            async def copy() -> None:
                await self._copy(target.source, rights, work, report, total)
                await trio.to_thread.run_sync(work.arrived.touch)
                report.phase = "converting"

            await _together(copy, convert)
        else:
            report.begin(target.total_bytes, len(manifest.layers) - len(held))
            report.phase = "converting"
            await trio.to_thread.run_sync(work.arrived.touch)
            await convert()
        await trio.to_thread.run_sync(self.store.commit, work, target.digest, config, made)
        report.finish()

    async def _copy(self, source: Reference, rights: Rights, work: Work, report: Report, max_bytes: int) -> None:
        report.phase = "fetching"
        await self.skopeo.copy(
            source, work.layout, rights, platform=self.platform, max_bytes=max_bytes, progress=report.count
        )

    async def _convert(
        self,
        work: Work,
        manifest: Manifest,
        config: ImageConfig,
        made: Sequence[Path],
        new: Collection[int],
        report: Report,
    ) -> None:
        """Converts new layers as they arrive, and joins all layers, in a separate process.

        :param made: the files that it writes
        """
        first = first_numbers(config.diff_ids)
        layers = [work.layer(first[diff_id]) for diff_id in config.diff_ids]
        todo = [
            LayerJob(
                blob=str(work.blob(layer.digest)),
                digest=layer.digest,
                size=layer.size,
                diff_id=diff_id,
                target=str(work.layer(number)),
                done=str(work.done(number)),
            )
            for number, (layer, diff_id) in enumerate(zip(manifest.layers, config.diff_ids, strict=True))
            if number in new
        ]
        job = ImageJob(
            tuple(todo),
            tuple(map(str, layers)),
            str(work.correcting),
            str(work.metadata),
            str(work.arrived),
            await self._confine(work, made, [path for path in dict.fromkeys(layers) if path not in made]),
            os.getpid(),
        )
        report.converted = [Path(each.done) for each in todo]
        status, output = await self.host.processes.run(
            [sys.executable, "-P", "-m", "volant.oci"],
            env={**PROGRAM_ENVIRONMENT, "PYTHONPATH": str(_PARENT), "TMPDIR": str(work.scratch)},
            cwd=work.scratch,
            timeout_s=float("inf"),
            stdin=msgspec.json.encode(job),
        )
        check_end(status, output)

    async def _confine(self, work: Work, made: Sequence[Path], held: Sequence[Path]) -> Confinement | None:
        isolation = self.skopeo.isolation
        if isolation is None:
            return None
        with disk_errors(OciError):
            groups = await isolation.prepare_files(self.host, made, held)
        return Confinement(
            directory=str(work.scratch),
            landlock=isolation.landlock > 0,
            read=(str(work.image),),
            write=tuple(map(str, made)),
            user=isolation.user,
            groups=groups,
        )

    async def _as_skopeo(self, work: Callable[[], T]) -> T:
        """Reads skopeo's files with its rights, as names there may lead anywhere."""
        with disk_errors(OciError):
            return await trio.to_thread.run_sync(as_user, self.skopeo.user, work)

    async def _readable(self, reference: Reference, work: Work) -> Reference:
        """Returns a reference to the same file in a place that skopeo's user may read."""
        isolation, path = self.skopeo.isolation, Path(reference.name)
        if isolation is None or isolation.user is None or reference.transport == "oci":
            return reference
        if not path.is_relative_to(self.store.work):
            # Not by an access list, as it is somebody's file.
            path = work.path / "archive"
            await self._copy_file(reference, path)
        with disk_errors(OciError):
            await isolation.let_read(self.host, path)
        return Reference(reference.transport, str(path), tag=reference.tag)

    async def _copy_file(self, reference: Reference, path: Path) -> None:
        source = Path(reference.name)
        try:
            figures = await trio.to_thread.run_sync(source.stat)
        except OSError as error:
            raise _unreadable(reference, str(error.strerror)) from None
        if not stat.S_ISREG(figures.st_mode):
            raise _unreadable(reference, "it is no regular file")
        self._check_size(reference, figures.st_size)
        with disk_errors(OciError):
            await self.host.files.copy(source, path)

    def _check_size(self, reference: Reference, size: int) -> None:
        if size > self.limits.max_bytes:
            raise OciError(
                "image_too_large", f"{reference} has layers of {size // 2**20} MiB, at most "
                f"{self.limits.max_bytes // 2**20} are allowed", "an administrator can allow more: oci_max_mb",
            )  # fmt: skip


def _missing(manifest: Manifest, held: set[int]) -> int:
    """Returns the bytes to fetch. An image may contain the same layer twice."""
    return sum(layer.size for layer in {layer for number, layer in enumerate(manifest.layers) if number not in held})


async def _resolve(
    skopeo: Skopeo, reference: Reference, rights: Rights, work: Work, platform: Platform
) -> tuple[bytes, Manifest]:
    """Returns the manifest for a platform that a reference leads to in a registry, as bytes and parsed."""
    data = await skopeo.inspect(reference, work.scratch, rights)
    if reference.digest and digest_of(data) != reference.digest:
        raise _mismatch(f"the manifest of {reference} has the digest {digest_of(data)}")
    document = parse_manifest(data)
    if isinstance(document, Index):
        entry = document.choose(platform)
        data = _checked(await skopeo.inspect(reference.with_digest(entry.digest), work.scratch, rights), entry)
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
    """Creates empty files, so that skopeo does not fetch layers that the cache has. Blocks."""
    with disk_errors(OciError):
        work.blob("").mkdir(parents=True)
        needed = {layer.digest for number, layer in enumerate(manifest.layers) if number not in held}
        for number in held:
            layer = manifest.layers[number]
            if layer.digest not in needed:
                with work.blob(layer.digest).open("wb") as file:
                    file.truncate(layer.size)


def _read_layout(work: Work, platform: Platform) -> tuple[str, Manifest, ImageConfig]:
    """Returns the only image of a layout written by skopeo. Blocks."""
    with disk_errors(OciError):
        index = parse_manifest(_read(work.layout / "index.json"))
        assert isinstance(index, Index)
        (entry,) = index.manifests
        manifest = parse_manifest(_checked(_read(work.blob(entry.digest)), entry))
        if not isinstance(manifest, Manifest):
            raise OciError("image_unsupported", "the file has an index of indexes", "copy one image out of it")
        document = _checked(_read(work.blob(manifest.config.digest)), manifest.config)
        return entry.digest, manifest, parse_config(document, manifest, platform)


def _read(path: Path) -> bytes:
    with open_theirs(path) as file:
        return file.read(MAX_DOCUMENT_BYTES + 1)


async def _together(*tasks: Callable[[], Awaitable[None]]) -> None:
    """Runs tasks at the same time. The first failure ends the others, and is raised alone."""
    failures: list[OciError] = []

    async with trio.open_nursery() as nursery:

        async def run(task: Callable[[], Awaitable[None]]) -> None:
            try:
                await task()
            except OciError as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        for task in tasks:
            nursery.start_soon(run, task)
    if failures:
        raise failures[0]


def _unreadable(reference: Reference, why: str) -> OciError:
    return OciError("image_not_found", f"{reference} can't be read: {why}", "check its path")


def _mismatch(what: str) -> OciError:
    return OciError("image_mismatch", what, "fetch it again; if it stays, the registry or a mirror is damaged")
