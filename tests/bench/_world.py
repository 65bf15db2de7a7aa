"""The environment of the benchmarks: a scratch directory, an image, and processes that end with their block."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.system.kit import REPOSITORY, Daemon, cache_dir
from volant import images

CHECKOUT = Path(os.environ.get("VOLANT_BENCH_CHECKOUT") or REPOSITORY)
"""The code of the measured daemon and of `volar`: another checkout, to compare two commits on one machine. It suits
benchmarks that only use the API and the command line; a script beside the daemon knows its own code's machine."""
_IMAGE_S = 300.0
CODE = {"PYTHONPATH": str(CHECKOUT)}
_LISTEN_S = 30.0
_END_S = 15.0


class Skipped(Exception):
    """It cannot be measured here; the text says why."""


def current_image() -> images.Image:
    """Returns the boot image of the measured daemon, and builds it if needed. :raises Skipped: without QEMU or image"""
    if shutil.which("qemu-system-x86_64") is None:
        raise Skipped("there is no qemu-system-x86_64")
    done = subprocess.run(
        [sys.executable, "-m", "volant.images", "build", "--cache", str(cache_dir())],
        cwd=CHECKOUT,
        env=os.environ | CODE,
        capture_output=True,
        timeout=_IMAGE_S,
        check=False,
    )
    said = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    image = images.load(cache_dir(), said["image"]["digest"]) if "image" in said else None
    if image is None:
        raise Skipped(f"there is no boot image: {said or done.stderr.decode(errors='replace')[-500:]}")
    return image


@contextmanager
def volantd(*flags: str) -> Iterator[Daemon]:
    """Runs a real daemon with its own state, as a user starts it."""
    # The last flag of a name wins: the default of the tests excludes KVM.
    daemon = Daemon(cache_dir(), "--accelerator", "auto", *flags, environ=CODE)
    daemon.cwd = CHECKOUT
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.dispose()


@contextmanager
def listening(module: str, *arguments: str) -> Iterator[str]:
    """Runs `python -m module`, which prints its address; gives the address."""
    process = subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=REPOSITORY, stdout=subprocess.PIPE)
    with ended(process):
        assert process.stdout is not None
        readable, _, _ = select.select([process.stdout], [], [], _LISTEN_S)
        line = process.stdout.readline().decode() if readable else ""
        if "listening on " not in line:
            raise RuntimeError(f"{module} did not start: {line!r}")
        yield line.rpartition(" ")[2].strip()


@contextmanager
def ended(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """Ends the process with the block."""
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def scratch(base: str | None = None) -> Iterator[Path]:
    """Makes a directory with mode 0700 and a short name, until the block ends."""
    path = Path(tempfile.mkdtemp(prefix="vb", dir=base or "/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def start_program(
    argv: Sequence[str], directory: Path, log_path: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a program as the leader of a session of its own, without input, and with its output in a file."""
    with log_path.open("wb") as log:
        return subprocess.Popen(
            argv, cwd=directory, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kills a session leader and all processes of its session; returns when it has ended."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(command: Sequence[str], timeout_s: float) -> str:
    """Runs a command; returns its output. :raises RuntimeError: if it fails"""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s,
        check=False,
    )  # fmt: skip
    said = done.stdout.decode(errors="replace").strip()
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {said[-2000:]}")
    return said
