"""Runs builds and fetches in a child process.

They decompress and hash for seconds, which would hold the daemon's GIL, and threads can't be cancelled. A killed child
leaves at worst files that the next one removes, and a child ends by SIGPIPE when the daemon is gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import trio

from ._errors import ImageError
from ._progress import Progress

_MAX_LINE = 64 * 1024
_MAX_STDERR = 16 * 1024
_REAP_S = 5.0


async def run_child(arguments: Sequence[str], progress: Callable[[Progress], None] | None) -> dict[str, object]:
    """Runs `python -m volant.images` with `--json-progress`; returns the last object of its output.

    Cancelling kills it and its children.

    :raises ImageError: the error that it reports; `build_failed` if it dies without a report
    """
    command = [sys.executable, "-P", "-m", "volant.images", *arguments, "--json-progress"]
    process = await trio.lowlevel.open_process(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(),
        # A group of its own, so that apt is killed, too.
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
    error = outcome.get("error")
    if isinstance(error, dict):
        raise ImageError(str(error.get("code")), str(error.get("message")), str(error.get("hint", "")))
    if not outcome or process.returncode != 0:
        last = complaints.decode(errors="replace").strip().splitlines()[-1:]
        raise ImageError("build_failed", f"The image builder died: {last[0] if last else 'without an error'}")
    return outcome


def _environment() -> dict[str, str]:
    # The child must import this very package, wherever that is.
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
            # Not from our child. Without a last line it counts as a failure.
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
