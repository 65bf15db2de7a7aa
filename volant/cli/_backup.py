"""`volar system backup` and `volar system restore`."""

# ruff: noqa: ASYNC240 - the command has nothing to do while it waits for the disk

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import click
import trio

from volant.client import ClientError

from ._downloads import download
from ._progress import progress
from ._run import CONFLICT, TIMED_OUT, Failure
from ._streaming import Session, command
from ._text import safe

_PIECE = 256 * 1024
_RESTARTS_S = 60.0
_POLL_S = 0.1


@command(None, "backup")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
async def backup(session: Session, file: Path, force: bool) -> None:
    """Back up the database of a running daemon to FILE: VMs, plugins, events, stored responses.

    VMs' disks, their logs and what they boot from are not in it. If FILE is a directory, the name of the new file
    contains the last event's id. The file is written atomically, after its digest was checked. To a pipe, such as
    /dev/stdout, it is written as it comes, and standard
    output gets nothing else.
    """
    async with session.client.system.backup() as taken:
        path = file / taken.name if file.is_dir() else file
        is_stream = path.exists() and not path.is_file()
        if not force and path.is_file():
            raise Failure(f"{path} exists already", code=CONFLICT, hint="name another file, or add --force")
        with download(path, 0o600, overwrite=force) as out:
            with progress(session.out) as bar:
                bar.total = taken.size
                async for piece in taken:
                    out.write(piece)
                    bar.add(len(piece))
            out.flush()
            if not is_stream:
                os.fsync(out.fileno())
    if is_stream:
        # Standard output may be what it was written to.
        session.out.note(f"{safe(str(path))}: {taken.size} bytes")
        return
    _sync_directory(path)
    session.out.result({"path": str(path), "bytes": taken.size}, f"{safe(str(path))}: {taken.size} bytes")


def _sync_directory(path: Path) -> None:
    """Makes the name of a new file durable. :raises Failure: the disk fails."""
    try:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise Failure(f"{safe(path)} can't be written: {error.strerror}") from None


@command(None, "restore")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--replace", is_flag=True, help="Restore although there are VMs that the backup lacks; running ones keep running."
)
async def restore(session: Session, file: Path, replace: bool) -> None:
    """Restore the daemon's database from FILE.

    Running VMs keep running. A VM that both the daemon and the backup have keeps its current row. The daemon checks
    the file first; then it closes all connections and restarts, with a new epoch of events. It keeps the old database
    beside the new one. For a daemon that does not start, use `volantd restore FILE`.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as source, progress(session.out) as bar:
            bar.total = size

            async def pieces() -> AsyncIterator[bytes]:
                while piece := source.read(_PIECE):
                    yield piece
                    bar.add(len(piece))

            restored = await session.client.system.restore(pieces(), size, replace=replace)
    except OSError as error:
        raise Failure(f"{file} can't be read: {error.strerror}") from None
    vms = None
    with trio.move_on_after(_RESTARTS_S):
        while vms is None:
            with suppress(ClientError):
                info = await session.client.system.info()
                if info.get("event_epoch") == restored.event_epoch:
                    vms = (await session.client.system.status()).vm_count
                    break
            await trio.sleep(_POLL_S)
    if vms is None:
        raise Failure(
            f"the backup is restored, but the daemon did not restart within {_RESTARTS_S:g} s",
            code=TIMED_OUT,
            hint="see its log; `volantd` starts with the restored database",
        )
    session.out.result({"event_epoch": restored.event_epoch, "vm_count": vms}, f"restored; there are {vms} VMs")
