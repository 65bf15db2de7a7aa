"""A daemon that is killed in a fetch leaves nothing partial, and the next one removes its credentials at once."""

from __future__ import annotations

import base64
import json
import os
import select
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.files import files_with
from tests.oci.kit import write_layout
from tests.oci.registry import PASSWORD, needs_registry
from tests.oci.test_images import BASE, FIRST
from tests.oci.test_resolve import held
from volant.daemon._directories import memory_dir
from volant.daemon._settings import Settings

pytestmark = [pytest.mark.programs, needs_registry]

PULL = """
import sys
from tests.daemon.test_oci_images import call
url, reference, auth = sys.argv[1:]
call(url, "POST", "/api/v1/images/pull", {"reference": reference}, Volant_Registry_Auth=auth)
"""
REPOSITORY = Path(__file__).resolve().parents[2]


@contextmanager
def daemon(path: Path, registry: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Runs a daemon for a block; its address and its process."""
    settings = Settings(state_dir=path / "s", runtime_dir=path / "r", cache_dir=path / "c")
    with (path / "log").open("ab") as log:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "volant.daemon.main", "--listen", "127.0.0.1:0", "--network", "none"),
                *("--state-dir", settings.state_dir, "--runtime-dir", settings.runtime_dir, "--accelerator", "tcg"),
                *("--cache-dir", settings.cache_dir, "--oci-plain-http", registry, "--log-level", "debug"),
            ],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
        )
    try:
        assert process.stdout is not None
        with process.stdout as stdout:
            assert select.select([stdout], [], [], 60)[0]
            yield stdout.readline().decode().rpartition(" ")[2].strip(), process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)
        if memory_dir(settings).exists():
            memory_dir(settings).rmdir()


def call(url: str, method: str, path: str, body: object = None, **headers: str) -> Any:
    fields = {"Content-Type": "application/json", **{name.replace("_", "-"): text for name, text in headers.items()}}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, method=method, data=data, headers=fields)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def until(condition: Callable[[], bool]) -> None:
    """Waits for something in another process that gives no notice."""
    give_up_at = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


async def test_a_killed_daemon_leaves_no_partial_image_and_its_credentials_go(tmp_path: Path) -> None:
    image = write_layout(tmp_path / "layout", [BASE, FIRST])
    (tmp_path / "d").mkdir()

    def story() -> None:
        reference = f"{registry.server.address}/app:t"
        header = base64.b64encode(registry.auth).decode()
        with daemon(tmp_path / "d", registry.server.address) as (url, process):
            pull = subprocess.Popen(
                [
                    *(sys.executable, "-c", PULL, url, reference, header),
                ],
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
            until(lambda: registry.layers_sent == 1)
            assert written(tmp_path / "d")
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert pull.wait(30) != 0
        assert written(tmp_path / "d")
        with daemon(tmp_path / "d", registry.server.address) as (url, _):
            until(lambda: not written(tmp_path / "d"))
            assert call(url, "GET", "/api/v1/images") == []
            until(lambda: not list((tmp_path / "d" / "c" / "oci" / "work").iterdir()))
            registry.server.released.set()
            found = call(url, "POST", "/api/v1/images/pull", {"reference": reference}, Volant_Registry_Auth=header)
            assert found["digest"] == image.digest
        assert not written(tmp_path / "d")

    with held(image) as registry:
        await trio.to_thread.run_sync(story)


def written(directory: Path) -> list[Path]:
    """Returns the files that contain the credentials."""
    word = base64.b64encode(f"puller:{PASSWORD}".encode())
    return files_with(directory, (PASSWORD.encode(), word, base64.b64encode(word)))
