"""`volar system backup` and `volar system restore`."""

# ruff: noqa: ASYNC240 - the command has nothing to do while it waits for the disk

from __future__ import annotations

import os
from pathlib import Path

import click

from ._downloads import download
from ._progress import progress
from ._run import CONFLICT, Failure
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

    It does not contain disks of VMs, logs, and the files that VMs boot from. If FILE is a directory, the name of the
    new file contains the last event's id. The file is written atomically, after its digest was checked. A pipe, such as
    /dev/stdout, receives the data as it arrives, and standard output contains nothing else.
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
