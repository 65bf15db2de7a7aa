"""Measures how fast programs start: a `volar` that asks and prints, and `volantd` until it listens."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from urllib.request import urlopen

import trio

from tests.system.kit import Daemon, cache_dir

from ._figure import Figure, Pairs
from ._world import CHECKOUT, CODE, volantd

LIST_S = 0.12
START_S = 0.25
ROUNDS = 21
STARTS = 9

_END_S = 30.0
_COMPILED = {"PYTHONDONTWRITEBYTECODE": ""}
"""Both sides run from compiled modules, as they do when they are installed."""


async def volar_list() -> list[Figure]:
    """Seconds of `volar vms list` with a daemon that runs, against `python -c pass`."""
    return await trio.to_thread.run_sync(_list)


async def daemon_start() -> list[Figure]:
    """Seconds from the `exec` of `volantd` until it listens, and until it has listed VMs, against
    `python -c "import trio"`."""
    return await trio.to_thread.run_sync(_start)


def _list() -> list[Figure]:
    against = Pairs()
    with volantd() as daemon:
        command = ["-m", "volant.cli.main", "--api", daemon.base_url, "vms", "list"]
        _took(command)
        for _ in range(ROUNDS):
            against.add(_took(command), _took(["-c", "pass"]))
    to = f"the {against.other:.2g} s of python -c pass"
    return [Figure("volar_list", against.value, "s", against.ratio, to, within=LIST_S)]


def _start() -> list[Figure]:
    against, listed = Pairs(), Pairs()
    daemon = Daemon(cache_dir(), ephemeral=False, environ=CODE | _COMPILED)
    daemon.cwd = CHECKOUT
    try:
        # The first one compiles modules and makes the database.
        for number in range(STARTS + 1):
            alone = _took(["-c", "import trio"])
            began = time.perf_counter()
            # Returns at the line "listening on".
            daemon.start()
            took = time.perf_counter() - began
            with urlopen(f"{daemon.base_url}/api/v1/vms", timeout=_END_S) as answer:
                answer.read()
            first = time.perf_counter() - began
            daemon.stop()
            if number:
                against.add(took, alone)
                listed.add(first, alone)
    finally:
        daemon.dispose()
    to = f"the {against.other:.2g} s of python -c 'import trio'"
    return [
        Figure("daemon_start", against.value, "s", against.ratio, to, within=START_S),
        Figure("daemon_first_list", listed.value, "s", listed.ratio, to),
    ]


def _took(arguments: list[str]) -> float:
    """Returns the seconds that Python runs. :raises CalledProcessError: if it fails"""
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments], cwd=CHECKOUT, env=os.environ | CODE | _COMPILED, stdout=subprocess.DEVNULL,
        timeout=_END_S, check=True,
    )  # fmt: skip
    return time.perf_counter() - began
