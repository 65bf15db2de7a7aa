"""The watchdog, a real process beside a real cgroup of version 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import read_line
from volant.host import _watchdog, own_cgroups
from volant.host._watchdog import Deadline, boottime

SOON_S = 10.0
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or own_cgroups("volant-test-watchdog") is None, reason="needs root and cgroups of version 2"
)


@contextmanager
def group(name: str) -> Iterator[Path]:
    groups = own_cgroups(name)
    assert groups is not None
    directory = groups.directory
    directory.mkdir(exist_ok=True)
    try:
        yield directory
    finally:
        if directory.exists():
            remove(directory)


def remove(directory: Path) -> None:
    """Removes a group as soon as its processes are gone."""
    until = time.monotonic() + SOON_S
    while True:
        try:
            directory.rmdir()
            return
        except OSError:
            assert time.monotonic() < until
            time.sleep(0.01)


@contextmanager
def watchdog(shared: Path, directory: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-I", "-S", _watchdog.__file__, str(shared), str(directory), "volant-test", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def frozen(directory: Path) -> bool:
    return "frozen 1" in (directory / "cgroup.events").read_text()


def await_frozen(directory: Path, within_s: float = SOON_S) -> float:
    """Returns when it is frozen, by the clock of the watchdog."""
    until = boottime() + within_s
    while not frozen(directory):
        assert boottime() < until
        time.sleep(0.005)
    return boottime()


def test_vms_are_frozen_when_their_time_is_over_and_only_the_daemon_thaws_them(tmp_path: Path) -> None:
    shared = tmp_path / "deadline"
    deadline = Deadline(shared, write=True)
    deadline.set(boottime() + 60)
    with group(f"volant-test-{os.getpid()}") as directory, subprocess.Popen(["sleep", "60"]) as vm:
        (directory / "cgroup.procs").write_text(str(vm.pid))
        with watchdog(shared, directory) as process:
            assert read_line(process) == "watching\n"
            end = boottime() + 0.5
            deadline.set(end)
            assert await_frozen(directory) >= end
            # Beats of a daemon that did not ask etcd change nothing.
            deadline.set(boottime() + 60)
            (directory / "cgroup.freeze").write_text("0")
            assert not frozen(directory)
            # A time that is half written counts as none.
            deadline._memory[:8] = b"\xff" * 8
            await_frozen(directory)
            (directory / "cgroup.freeze").write_text("0")
            await_frozen(directory)
            vm.kill()
            vm.wait()
            remove(directory)
            assert process.wait(SOON_S) == 0


def test_there_is_one_watchdog_and_it_outlives_the_daemon(tmp_path: Path) -> None:
    shared = tmp_path / "deadline"
    Deadline(shared, write=True).set(boottime() + 60)
    with group(f"volant-test-{os.getpid()}") as directory, watchdog(shared, directory) as process:
        assert read_line(process) == "watching\n"
        with watchdog(shared, directory) as second:
            assert second.wait(SOON_S) == 3
        # A daemon that was stopped in the middle of a beat, and never goes on.
        code = (
            f"import sys; sys.path.insert(0, {str(Path(_watchdog.__file__).parent)!r})\n"
            "import _watchdog, pathlib, os, signal\n"
            f"_watchdog.Deadline(pathlib.Path({str(shared)!r}), write=True).set(_watchdog.boottime() + 0.3)\n"
            "os.kill(os.getpid(), signal.SIGSTOP)"
        )
        with subprocess.Popen([sys.executable, "-I", "-c", code]) as daemon:
            try:
                await_frozen(directory)
            finally:
                daemon.send_signal(signal.SIGKILL)
        assert process.poll() is None
