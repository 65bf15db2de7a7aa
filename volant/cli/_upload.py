"""Uploads files of manifests to the daemon's cache; `volar plugins upload`."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec
import trio

from volant.images import local_path
from volant.model import ArtifactView, Boot

from ._call import FileBody
from ._run import Failure
from ._streaming import Session, command
from ._text import size

T = TypeVar("T")


@command(None, "upload")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
async def upload(session: Session, file: Path) -> None:
    """Upload FILE, which a manifest names, to the daemon's cache."""
    try:
        sha256 = await trio.to_thread.run_sync(_digest, file, abandon_on_cancel=True)
        sent = await _upload(session, file, sha256)
    except OSError as error:
        raise Failure(f"{file} can't be read: {error.strerror}") from None
    session.out.result(sent, f"{sent.sha256} is in the cache, {size(sent.size_bytes)}")


async def upload_files(session: Session, files: Sequence[tuple[str, Path]]) -> None:
    """Uploads files with their digests.

    :raises OSError: one can't be read.
    :raises Failure: one has another digest.
    """
    for sha256, path in files:
        # A stranger's manifest may name any file of this user, so a file with another digest is not sent.
        if await trio.to_thread.run_sync(_digest, path, abandon_on_cancel=True) != sha256:
            raise Failure(
                f"{path} has another SHA-256 than the manifest; nothing was sent",
                hint=f"`sha256sum {path}` shows it",
            )
        await _upload(session, path, sha256)


def local_files(manifest: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """Returns the local files that a manifest names, with their digests; none if the manifest is invalid."""
    try:
        boot = msgspec.convert(manifest.get("boot"), Boot | None)
    except msgspec.ValidationError:
        return []
    named = (boot.kernel, boot.initramfs, boot.rootfs) if boot is not None else ()
    return [(each.sha256, path) for each in named if each is not None and (path := local_path(each.url)) is not None]


async def _upload(session: Session, path: Path, sha256: str) -> ArtifactView:
    """Uploads a file. :raises OSError: it can't be read."""
    return await _send(session, path, partial(session.client.plugins.upload, sha256))


async def send_file(session: Session, path: Path, send: Callable[[FileBody, int], Awaitable[T]]) -> T:
    """Calls `send` with the content of a file and its size. :raises Failure: it can't be read."""
    try:
        return await _send(session, path, send)
    except OSError as error:
        raise Failure(f"{path} can't be read: {error.strerror}") from None


async def _send(session: Session, path: Path, send: Callable[[FileBody, int], Awaitable[T]]) -> T:
    """Calls `send` with the content of a file and its size. :raises OSError: it can't be read."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        figures = os.fstat(fd)
        if not stat.S_ISREG(figures.st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        session.out.note(f"uploading {path}, {size(figures.st_size)}")
        return await send(FileBody(fd), figures.st_size)
    finally:
        os.close(fd)


def _digest(path: Path) -> str:
    """Returns the SHA-256 of a file. :raises OSError: it can't be read, or is not a regular file, which might be
    endless."""
    if not path.is_file():
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
