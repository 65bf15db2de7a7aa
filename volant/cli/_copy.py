"""`volar vms cp`: files and directories between this machine and a VM.

Data from a VM is not trusted: the agent's own code unpacks directories here. It opens each part of a path relative to
the directory before it and follows no link. No file gets an owner, a set-user-id bit, or a path outside the target.
"""

# ruff: noqa: ASYNC240 - the command has nothing to do while it waits for the disk

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import trio

from volant.client import Client, ClientProblem, FileInfo
from volant.guest._http import Problem as TarProblem
from volant.guest._tar import pack, unpack

from ._complete import files_here_or_in_a_vm
from ._downloads import beside, download
from ._guest import once_running
from ._progress import Bar, progress
from ._run import Failure
from ._streaming import Session, command
from ._terminal import read_input, write_output
from ._text import safe

_PIECE = 256 * 1024
_REMOTE = re.compile(r"([a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?):(.*)\Z", re.DOTALL)


@dataclass(frozen=True)
class _Remote:
    vm: str
    path: str

    @property
    def name(self) -> str:
        return self.path.rstrip("/").rpartition("/")[2]

    def below(self, name: str) -> _Remote:
        return _Remote(self.vm, f"{self.path.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return f"{self.vm}:{self.path}"


@command(None, "cp")
@click.argument("source", metavar="SRC", shell_complete=files_here_or_in_a_vm)
@click.argument("target", metavar="DST", shell_complete=files_here_or_in_a_vm)
@click.option("--user", help="Owner of the copies in the VM, with an optional :GROUP; default: root.")
async def copy(session: Session, source: str, target: str, user: str | None) -> None:
    """Copy files and directories between this host and a VM.

    One of SRC and DST is VM:/PATH. The other is a local path (./a:b if it contains a colon), or - for standard input or
    output, where a directory is a tar. If DST is an existing directory, SRC is copied into it with its name; otherwise
    the copy becomes DST. A file is replaced atomically. Modes are kept; in the VM, root or --user owns all files.
    """
    from_vm, to_vm = _remote(source), _remote(target)
    if (from_vm is None) == (to_vm is None):
        raise click.UsageError("exactly one of SRC and DST has to be VM:/PATH")
    with progress(session.out) as bar:
        if from_vm is not None:
            if user is not None:
                raise click.UsageError("--user is for what is copied into a VM")
            download = partial(_download, session.client, from_vm, target, bar)
            copied, where = await once_running(session, from_vm.vm, download)
        else:
            assert to_vm is not None
            if source == "-":
                # Wait for the VM first, as input from a pipe can't be read again.
                await once_running(session, to_vm.vm, partial(session.client.vms.stat_file, to_vm.vm, "/"))
            upload = partial(_upload, session.client, source, to_vm, user, bar)
            copied, where = await once_running(session, to_vm.vm, upload)
    if session.out.json and target != "-":
        session.out.document({"path": where, "bytes": copied})


def _remote(text: str) -> _Remote | None:
    found = _REMOTE.match(text)
    if found is None:
        return None
    if not found[2].startswith("/"):
        raise click.UsageError(f"{text!r}: paths in a VM begin with /")
    return _Remote(found[1], found[2])


# From a VM


async def _download(client: Client, source: _Remote, target: str, bar: Bar) -> tuple[int, str]:
    info = await client.vms.stat_file(source.vm, source.path)
    if target == "-":
        reader = client.vms.get_tar if info.is_directory else client.vms.read_file
        async with reader(source.vm, source.path) as file:
            async for data in file:
                await write_output(data)
                bar.add(len(data))
        return bar.done, "-"
    path = Path(target)
    if path.is_dir():
        if not source.name:
            raise Failure(f"{source} has no name for its copy in {target}", hint="name a directory that does not exist")
        path /= source.name
    with _local(path):
        if info.is_directory:
            await _download_directory(client, source, path, bar)
        else:
            await _download_file(client, source, info, path, bar)
    return bar.done, str(path)


async def _download_file(client: Client, source: _Remote, info: FileInfo, path: Path, bar: Bar) -> None:
    if path.is_dir():
        raise Failure(f"{path} is a directory")
    async with client.vms.read_file(source.vm, source.path) as file:
        bar.total = file.info.size
        with download(path, 0o600) as opened:
            async for data in file:
                await trio.to_thread.run_sync(opened.write, data)
                bar.add(len(data))
            os.fchmod(opened.fileno(), info.mode & 0o777)


async def _download_directory(client: Client, source: _Remote, path: Path, bar: Bar) -> None:
    if path.exists() and not path.is_dir():
        raise Failure(f"{path} is no directory")
    # A new directory appears only when it is complete.
    into = path if path.exists() else beside(path)
    into.mkdir(exist_ok=True)
    try:
        await _unpack(client, source, into, bar)
        if into != path:
            into.rename(path)
    except BaseException:
        if into != path:
            shutil.rmtree(into)
        raise


async def _unpack(client: Client, source: _Remote, path: Path, bar: Bar) -> None:
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        async with client.vms.get_tar(source.vm, source.path) as tar:
            pieces = aiter(tar)

            async def next_piece() -> bytes:
                data = await anext(pieces, b"")
                bar.add(len(data))
                return data

            def body() -> Iterator[bytes]:
                while data := trio.from_thread.run(next_piece):
                    yield data

            mine = (os.geteuid(), os.getegid())
            await trio.to_thread.run_sync(lambda: unpack(body(), directory, mine, modes=0o777))
    except TarProblem as problem:
        raise Failure(f"{source}: {problem.detail}") from None
    finally:
        os.close(directory)


# To a VM


async def _upload(client: Client, source: str, target: _Remote, user: str | None, bar: Bar) -> tuple[int, str]:
    if source == "-":
        where = target
        await client.vms.write_file(target.vm, target.path, _Pieces(lambda: read_input(_PIECE), bar), user=user)
        return bar.done, str(where)
    path = Path(source)
    with _local(path):
        found = path.stat()
    name = path.resolve().name
    where = target
    remote = await _stat(client, target)
    if target.path.endswith("/") and remote is None:
        raise Failure(f"there is no directory {target}", hint="without the / at its end it would be created")
    if remote is not None and remote.is_directory:
        where = target.below(name)
    if stat.S_ISDIR(found.st_mode):
        await _upload_directory(client, path, where, user, bar)
    elif stat.S_ISREG(found.st_mode):
        with _local(path):
            opened = await trio.open_file(path, "rb")
        async with opened:
            bar.total = found.st_size
            pieces = _Pieces(lambda: opened.read(_PIECE), bar)
            mode = found.st_mode & 0o777
            # Without a length, as a file that grows meanwhile would break the request.
            await client.vms.write_file(where.vm, where.path, pieces, mode=mode, user=user)
    else:
        raise Failure(f"{source} is neither a file nor a directory")
    return bar.done, str(where)


async def _stat(client: Client, remote: _Remote) -> FileInfo | None:
    try:
        return await client.vms.stat_file(remote.vm, remote.path)
    except ClientProblem as problem:
        # If there is no such VM, the next request reports it.
        if problem.status == 404:
            return None
        raise


async def _upload_directory(client: Client, path: Path, where: _Remote, user: str | None, bar: Bar) -> None:
    put, take = trio.open_memory_channel[bytes](1)
    failure: Exception | None = None

    async def give(data: bytes) -> None:
        await put.send(data)

    async def next_piece() -> bytes:
        try:
            return await take.receive()
        except trio.EndOfChannel:
            if failure is not None:
                raise failure from None
            return b""

    async with trio.open_nursery() as nursery:

        async def packing() -> None:
            nonlocal failure
            async with put:
                try:
                    await trio.to_thread.run_sync(
                        lambda: pack(os.fsencode(path), lambda data: trio.from_thread.run(give, data), (0, 0))
                    )
                except OSError as error:
                    failure = Failure(f"{error.filename or path} can't be read: {error.strerror}")
                except trio.BrokenResourceError:
                    pass  # The guest refused the rest, and `put_tar` raises its error.

        nursery.start_soon(packing)
        refused: Exception | None = None
        async with take:
            try:
                await client.vms.put_tar(where.vm, where.path, _Pieces(next_piece, bar), user=user)
            except Exception as error:
                refused = error
    if refused is not None:
        raise refused


class _Pieces:
    """Calls `read` for each piece until it returns nothing, and counts the bytes."""

    def __init__(self, read: Callable[[], Awaitable[bytes]], bar: Bar) -> None:
        self._read = read
        self._bar = bar

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        data = await self._read()
        if not data:
            raise StopAsyncIteration
        self._bar.add(len(data))
        return data


@contextmanager
def _local(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise Failure(f"{safe(str(error.filename or path))}: {error.strerror}") from None
