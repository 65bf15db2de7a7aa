"""`volar` against a server that a test writes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

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
