"""Each example runs, and the demo leaves nothing behind, also when it is interrupted."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
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
def nothing_left() -> Iterator[dict[str, str]]:
    """An environment for a demo; afterwards its temporary folder is empty and no process speaks of it."""
    # Short, as sockets lie beneath it.
    folder = Path(f"/tmp/vx{os.getpid()}")
    folder.mkdir()
    yield ENVIRONMENT | {"TMPDIR": str(folder), "PYTHONPATH": str(ROOT)}
    assert list(folder.iterdir()) == []
    folder.rmdir()
    mark = f"{folder}/".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                facts = os.fsencode((entry / "cwd").readlink()) + b"\0" + (entry / "cmdline").read_bytes()
            except OSError:
                continue
            assert mark not in facts


def test_the_demo_succeeds(nothing_left: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, DEMO], env=nothing_left, capture_output=True, text=True, check=False, timeout=LONG_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shown = ("Debian GNU/Linux", "VM_RUNNING", "hello from the guest", "Linux demo", "supervisor", "VM_DELETED")
    for what in shown:
        assert what in done.stdout


INTERRUPTED = """
import importlib.util, signal, sys
spec = importlib.util.spec_from_file_location("volant_demo", sys.argv[1])
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)
demo.volar = lambda *words: None if words[0] == "boot-images" else signal.pause()
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
