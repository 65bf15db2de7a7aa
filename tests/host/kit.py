"""Starts processes for the tests of volant/host."""

from __future__ import annotations

import sys
from pathlib import Path

import trio
import trio.testing

from volant.host import Host
from volant.model import ProcessIdentity


async def spawn(host: Host, tag: str, tmp_path: Path, code: str, started: list[ProcessIdentity]) -> ProcessIdentity:
    argv = [sys.executable, "-c", code, f"guest={tag},x=y"]
    identity = await host.processes.spawn(
        argv, tag=tag, env={"ONLY": "this"}, cwd=tmp_path, stdout_path=tmp_path / "out"
    )
    started.append(identity)
    return identity


SLEEP = "import time; print('up', flush=True); time.sleep(60)"


async def until_output(host: Host, path: Path, text: bytes) -> bytes:
    with trio.fail_after(10), host.watches.open(path) as watch:
        while text not in (output := await host.files.read(path)):
            await watch.wait()
    return output
