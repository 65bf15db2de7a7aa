"""`volar` against a server that a test writes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import trio

from tests.client.kit import Server

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {key: value for key, value in os.environ.items() if not key.startswith("VOLANT_")}


@dataclass(frozen=True)
class Done:
    """How a `volar` ended."""

    code: int
    out: bytes
    err: str
    """What is no UTF-8 in it is escaped."""


def command(*words: str) -> list[str]:
    """The command line of a `volar`."""
    return [sys.executable, "-m", "volant.cli.main", *words]


async def volar(server: Server | None, *words: str, environ: dict[str, str] | None = None, stdin: bytes = b"") -> Done:
    """Run a `volar` of its own to its end."""
    env = ENVIRONMENT | ({"VOLANT_API_BASE": server.base_url} if server else {}) | (environ or {})
    with trio.fail_after(20):
        done = await trio.run_process(
            command(*words), stdin=stdin, capture_stdout=True, capture_stderr=True, check=False, env=env, cwd=ROOT
        )
    return Done(done.returncode, done.stdout, done.stderr.decode(errors="backslashreplace"))


@asynccontextmanager
async def running(server: Server, words: Sequence[str]) -> AsyncIterator[trio.Process]:
    """A `volar` that runs while the block does."""
    env = ENVIRONMENT | {"VOLANT_API_BASE": server.base_url}
    # `nohup make test` has programs ignore it.
    words = ["env", "--default-signal=HUP", *command(*words)]
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False, env=env)
        process: trio.Process = await nursery.start(partial(start, cwd=ROOT))
        try:
            with trio.fail_after(20):
                yield process
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGKILL)


class Terminal:
    """A `volar` at a terminal."""

    def __init__(self, process: trio.Process, fd: int, theirs: int, before: list[object]) -> None:
        self.process = process
        self.seen = b""
        """All that it has shown."""
        self._fd = fd
        self._theirs = theirs
        self._before = before
        self._expected = 0

    async def expect(self, pattern: bytes) -> bytes:
        """Waits until it shows this, after what was expected before; returns it."""
        with trio.move_on_after(30):
            while not (found := re.compile(pattern).search(self.seen, self._expected)):
                await trio.lowlevel.wait_readable(self._fd)
                self.seen += os.read(self._fd, 65536)
            self._expected = found.end()
            return found[0]
        pytest.fail(f"no {pattern!r} in {self.seen[self._expected :]!r}")

    def type(self, data: bytes) -> None:
        os.write(self._fd, data)

    def is_as_before(self) -> bool:
        return termios.tcgetattr(self._theirs) == self._before

    async def end(self) -> int:
        with trio.fail_after(30):
            return await self.process.wait()


@asynccontextmanager
async def at_terminal(base_url: str, *words: str, rows: int = 40, columns: int = 150) -> AsyncIterator[Terminal]:
    """A `volar` at a terminal of that size, while the block runs."""
    fd, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    before = termios.tcgetattr(theirs)
    run = partial(
        trio.run_process, command(*words), stdin=theirs, stdout=theirs, stderr=theirs, check=False,
        env=ENVIRONMENT | {"VOLANT_API_BASE": base_url, "TERM": "xterm-test"}, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(run)
            try:
                yield Terminal(process, fd, theirs, before)
            finally:
                if process.returncode is None:
                    process.kill()
    finally:
        os.close(fd)
        os.close(theirs)
