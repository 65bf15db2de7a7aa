"""A daemon that runs out of descriptors logs it once, and serves again when some are free."""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from volant.daemon._directories import memory_dir
from volant.daemon._settings import Settings

pytestmark = pytest.mark.programs

REPOSITORY = Path(__file__).resolve().parents[2]
LIMIT = 96


@contextmanager
def daemon(path: Path, soft: int, hard: int) -> Iterator[str]:
    settings = Settings(state_dir=path / "s", runtime_dir=path / "r", cache_dir=path / "c")
    with (path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "volant.daemon.main", "--listen", "127.0.0.1:0", "--network", "none"),
                *("--state-dir", settings.state_dir, "--runtime-dir", settings.runtime_dir, "--accelerator", "tcg"),
                *("--cache-dir", settings.cache_dir, "--max-vms", "40", "--sandbox", "off"),
            ],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)),
        )
    try:
        assert process.stdout is not None
        with process.stdout as stdout:
            assert select.select([stdout], [], [], 60)[0]
            yield stdout.readline().decode().rpartition(" ")[2].strip()
    finally:
        process.terminate()
        assert process.wait(30) == 0
        assert not memory_dir(settings).exists()


def healthy(url: str) -> bool:
    deadline = time.monotonic() + 30
    while True:
        try:
            with urlopen(f"{url}/healthz", timeout=30) as answer:
                return bool(answer.status == 200)
        except HTTPError as error:
            # The daemon is still starting.
            if error.code != 503 or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_a_low_hard_limit_is_logged_with_the_needed_figure(tmp_path: Path) -> None:
    with daemon(tmp_path, 64, 512) as url:
        assert healthy(url)
    said = (tmp_path / "log").read_text()
    assert "may open 512 files and sockets: that is enough for about 12 VMs; 40 can run, which need 1056" in said


def test_a_low_soft_limit_is_raised_silently(tmp_path: Path) -> None:
    with daemon(tmp_path, 64, 4096) as url:
        assert healthy(url)
    assert "files and sockets" not in (tmp_path / "log").read_text()


def test_without_descriptors_clients_wait_and_the_log_has_one_line(tmp_path: Path) -> None:
    with daemon(tmp_path, LIMIT, LIMIT) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        with ExitStack() as stack:
            # None is idle, so none is closed in favour of others.
            for _ in range(LIMIT):
                sock = stack.enter_context(socket.create_connection((host, int(port))))
                sock.sendall(b"GET /api/v1/events/vms HTTP/1.1\r\nHost: localhost\r\n\r\n")
            deadline = time.monotonic() + 30
            while "clients wait to be accepted" not in (tmp_path / "log").read_text():
                assert time.monotonic() < deadline
                time.sleep(0.05)
            # Long enough for thirty tries, had they not become fewer.
            time.sleep(3)
        assert healthy(url)
    said = (tmp_path / "log").read_text()
    assert said.count("clients wait to be accepted: Too many open files") == 1
    assert "Traceback" not in said
