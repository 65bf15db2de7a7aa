"""`volar system backup` and `volar system restore`."""

# ruff: noqa: ASYNC240 - whoever keeps a backup waits for their own disk anyway

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import click
import trio

from volant.client import ClientError

from ._progress import progress
from ._run import CONFLICT, TIMED_OUT, Failure
from ._streaming import Session, command
from ._text import safe

_PIECE = 256 * 1024
_BEGINS_ANEW_S = 60.0
_ASK_AGAIN_S = 0.1


@command(None, "backup")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
async def backup(session: Session, file: Path, force: bool) -> None:
    """Back up the daemon's database to FILE while it works: VMs, plugins, events, stored responses.

    VMs' disks, their logs and what they boot from are not in it. In a directory the file gets a name that tells how
    far the events go. It is written whole or not at all, and only if it is what the daemon has sent.
    """
    async with session.client.system.backup() as taken:
        path = file / taken.name if file.is_dir() else file
        if not force and path.exists():
            raise Failure(f"{path} is there already", code=CONFLICT, hint="name another file, or say --force")
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                with progress(session.out) as bar:
                    bar.total = taken.size
                    async for piece in taken:
                        out.write(piece)
                        bar.add(len(piece))
                out.flush()
                os.fsync(out.fileno())
            _name(part, path, force)
        except OSError as error:
            raise Failure(f"{path} can't be written: {error.strerror}") from None
        finally:
            with suppress(OSError):
                part.unlink()
    session.out.result({"path": str(path), "bytes": taken.size}, f"{safe(str(path))}: {taken.size} bytes")


def _name(part: Path, path: Path, force: bool) -> None:
    """Give the finished file its name. :raises OSError: somebody else has taken it meanwhile."""
    if force:
        part.replace(path)
    else:
        os.link(part, path)
    descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@command(None, "restore")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--replace", is_flag=True, help="Also if there are VMs that the backup does not know; those that run go on."
)
async def restore(session: Session, file: Path, replace: bool) -> None:
    """Restore the daemon's database from FILE.

    VMs that run go on, those of which the daemon knows more than the backup as they are now. The daemon looks through
    the file first; then it ends all connections and begins anew, with a new epoch of events. The database of before is
    kept beside the new one. For a daemon that does not start there is `volantd restore FILE`.
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
    with trio.move_on_after(_BEGINS_ANEW_S):
        while vms is None:
            with suppress(ClientError):
                info = await session.client.system.info()
                if info.get("event_epoch") == restored.event_epoch:
                    vms = (await session.client.system.status()).vm_count
                    break
            await trio.sleep(_ASK_AGAIN_S)
    if vms is None:
        raise Failure(
            f"the backup is restored, and the daemon was not seen to begin anew within {_BEGINS_ANEW_S:g} s",
            code=TIMED_OUT,
            hint="its log says why; `volantd` comes back with the restored database",
        )
    session.out.result({"event_epoch": restored.event_epoch, "vm_count": vms}, f"restored; there are {vms} VMs")
