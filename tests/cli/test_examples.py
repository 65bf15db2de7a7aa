"""Each example runs, and the demo leaves nothing behind, also when it is interrupted."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest

from tests.processes import killed_after, read_line

from .kit import ENVIRONMENT, ROOT

DEMO = ROOT / "examples" / "demo.py"
# With a build of the image that has to fetch its packages.
LONG_S = 300.0

pytestmark = [pytest.mark.system, pytest.mark.slow]


@pytest.fixture
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("volant_demo", DEMO)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def nothing_left(demo: ModuleType) -> Iterator[dict[str, str]]:
    """An environment for a demo; afterwards its temporary folder is empty and no process speaks of it."""
    # Short, as sockets lie beneath it.
    folder = Path(tempfile.mkdtemp(prefix="vx", dir="/tmp"))
    try:
        yield ENVIRONMENT | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
        assert list(folder.iterdir()) == []
        assert demo.processes_of(folder) == []
    finally:
        # A daemon that a failed test has left deletes its VMs and what it keeps outside the folder.
        end_all(demo, folder)
        shutil.rmtree(folder)


def end_all(demo: ModuleType, folder: Path) -> None:
    """Ends the processes that speak of a folder, by force those that remain after 30 s."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for pid in demo.processes_of(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        give_up_at = time.monotonic() + 30
        while demo.processes_of(folder) and time.monotonic() < give_up_at:
            time.sleep(0.1)


def test_the_demo_succeeds(nothing_left: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, DEMO], env=nothing_left, capture_output=True, text=True, check=False, timeout=LONG_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = ("Debian GNU/Linux", "VM_RUNNING", "hello from the guest", "Linux demo", "supervisor", "VM_DELETED")
    for what in shown:
        assert what in done.stdout


INTERRUPTED = """
import importlib.util, sys, time
spec = importlib.util.spec_from_file_location("volant_demo", sys.argv[1])
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)
def volar(*words):
    # Not `signal.pause`, which waits forever if the signal arrives just before it.
    while words[0] != "boot-images":
        time.sleep(0.05)
demo.volar = volar
sys.exit(demo.main())
"""
"""A demo that starts a daemon, and then waits for a signal instead of running commands."""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_daemon(nothing_left: dict[str, str], signum: int) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, DEMO], env=nothing_left, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        while "listening on" not in read_line(process, 60):
            pass
        # Ctrl-C reaches everybody at the terminal, a plain kill the demo alone.
        (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
        with killed_after(60, process):
            text = process.communicate()[0]
    assert process.returncode == 130, text
    assert "interrupted; everything is cleaned up" in text
    assert "Traceback" not in text


def test_the_client_examples_run(
    nothing_left: dict[str, str], demo: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", nothing_left["TMPDIR"])
    with demo.scratch() as folder, demo.daemon(folder) as api:
        done = subprocess.run(
            [sys.executable, ROOT / "examples" / "parallel.py", api],
            env=nothing_left, capture_output=True, text=True, check=False, timeout=LONG_S,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(line.split()[:2] for line in done.stdout.splitlines()) == [["hello", str(n)] for n in range(4)]
