"""The daemon's door to images: builds run in a process of their own.

A build is seconds of decompression and hashing: in a thread it would hold the daemon's GIL, and a thread can't be
cancelled. A process can be killed, leaves at worst a folder that the next build removes, and dies by itself when the
daemon is gone and nobody reads what it says.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import trio

from . import _store
from ._errors import ImageError
from ._packages import Progress
from ._store import Image

_MAX_LINE = 64 * 1024
_MAX_STDERR = 16 * 1024
_REAP_S = 5.0


async def ensure(
    cache_dir: Path,
    *,
    deadline_s: float,
    progress: Callable[[Progress], None] | None = None,
    arguments: tuple[str, ...] = (),
) -> Image:
    """Return the current image of the cache, building it when there is none; several callers share one build.

    Cancelling ends the build: its processes are killed.

    :param deadline_s: how long it may take in all
    :param progress: hears how far the build is, in the caller's task
    :param arguments: further ones for `python -m volant.images build`, `--mirror URL` for instance
    :raises ImageError: there is no image, and why; `timeout` when the deadline has passed
    """
    found = await trio.to_thread.run_sync(_store.find, cache_dir)
    if found is not None:
        return found
    with trio.move_on_after(deadline_s):
        return await _build(cache_dir, progress, arguments)
    raise ImageError(
        "timeout",
        f"The image was not built within {deadline_s:g} s",
        "check the network, or build it beforehand with `volar images build`",
    )


async def _build(cache_dir: Path, progress: Callable[[Progress], None] | None, arguments: tuple[str, ...]) -> Image:
    command = [sys.executable, "-P", "-m", "volant.images", "build", "--cache", str(cache_dir), "--json-progress"]
    process = await trio.lowlevel.open_process(
        [*command, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(),
        # Its own group, so that apt goes with it.
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    outcome: dict[str, object] = {}
    complaints = bytearray()

    async def read_complaints(stream: trio.abc.ReceiveStream) -> None:
        async for piece in stream:
            complaints.extend(piece)
            del complaints[:-_MAX_STDERR]

    try:
        async with process.stdout, process.stderr, trio.open_nursery() as nursery:
            nursery.start_soon(read_complaints, process.stderr)
            async for line in _lines(process.stdout):
                message = _decode(line)
                if "phase" in message:
                    if progress is not None:
                        progress(_progress(message))
                else:
                    outcome = message
        await process.wait()
    finally:
        if process.returncode is None:
            _kill(process)
            with trio.CancelScope(shield=True), trio.move_on_after(_REAP_S):
                await process.wait()
    return await trio.to_thread.run_sync(_result, cache_dir, outcome, bytes(complaints))


def _environment() -> dict[str, str]:
    # The child must find the package that this one is, wherever it was imported from.
    parent = str(Path(__file__).resolve().parent.parent.parent)
    known = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{parent}:{known}" if known else parent}


def _kill(process: trio.Process) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


async def _lines(stream: trio.abc.ReceiveStream) -> AsyncIterator[bytes]:
    buffer = bytearray()
    async for piece in stream:
        buffer += piece
        while (end := buffer.find(b"\n")) >= 0:
            line = bytes(buffer[:end])
            del buffer[: end + 1]
            yield line
        if len(buffer) > _MAX_LINE:
            # Nonsense; without the line that it should end with, this counts as a failure anyway.
            buffer.clear()


def _decode(line: bytes) -> dict[str, object]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _progress(message: dict[str, object]) -> Progress:
    done, total = message.get("done"), message.get("total")
    return Progress(
        str(message["phase"]),
        str(message.get("message", "")),
        done if isinstance(done, int) else 0,
        total if isinstance(total, int) else 0,
        str(message.get("unit", "")),
    )


def _result(cache_dir: Path, outcome: dict[str, object], complaints: bytes) -> Image:
    image, error = outcome.get("image"), outcome.get("error")
    if isinstance(image, dict):
        found = _store.load(cache_dir, str(image.get("digest")))
        if found is not None:
            return found
    if isinstance(error, dict):
        raise ImageError(str(error.get("code")), str(error.get("message")), str(error.get("hint", "")))
    last = complaints.decode(errors="replace").strip().splitlines()[-1:]
    raise ImageError("build_failed", f"The image builder died: {last[0] if last else 'it said nothing'}")
