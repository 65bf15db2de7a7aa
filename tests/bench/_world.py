"""Where the benches run: a scratch directory, an image, and processes that end with the block that started them."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.system.kit import REPOSITORY, Daemon, cache_dir
from volant import images

_IMAGE_S = 300.0
_LISTEN_S = 30.0
_END_S = 15.0


class Skipped(Exception):
    """It can't be measured here; the text says why."""


def current_image() -> images.Image:
    """The image that VMs boot, built when it lacks. :raises Skipped: there is no QEMU, or no image to be had."""
    if shutil.which("qemu-system-x86_64") is None:
        raise Skipped("there is no qemu-system-x86_64")
    done = subprocess.run(
        [sys.executable, "-m", "volant.images", "build", "--cache", str(cache_dir())],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=_IMAGE_S,
        check=False,
    )
    image = images.find(cache_dir())
    if image is None:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Skipped(f"there is no boot image: {last[0] if last else 'the builder said nothing'}")
    return image


@contextmanager
def volantd(*flags: str) -> Iterator[Daemon]:
    """A real daemon with state of its own, as a user starts it."""
    # The last flag of a name wins: the kit's own would keep KVM out.
    daemon = Daemon(cache_dir(), "--accelerator", "auto", *flags)
    try:
        daemon.start()
        yield daemon
    finally:
        daemon.dispose()


@contextmanager
def listening(module: str, *arguments: str) -> Iterator[str]:
    """`python -m module`, which prints where it listens; gives that address."""
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
    """The process has ended when the block has."""
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
    """A directory, 0700 and with a short name, which goes with the block."""
    path = Path(tempfile.mkdtemp(prefix="vb", dir=base or "/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session, and all that is in it; returns when it is gone."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run(command: Sequence[str], timeout_s: float) -> str:
    """Run a command to its end; what it said. :raises RuntimeError: it failed."""
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s,
        check=False,
    )  # fmt: skip
    said = done.stdout.decode(errors="replace").strip()
    if done.returncode:
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {said[-2000:]}")
    return said
