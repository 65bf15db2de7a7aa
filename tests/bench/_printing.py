"""Measures `/healthz` while many guests print, and so compete with the daemon for processors."""

from __future__ import annotations

import json
from statistics import median
from urllib.parse import urlsplit

import trio

from tests.system.kit import Daemon

from ._boot import BOOT_S, WANTED
from ._figure import Figure, percentile
from ._serving import probe
from ._streams import _begun, _sockets
from ._world import current_image, volantd

VMS = 20
LINES_PER_S = 100
TARGET_MS = 30.0

_SETTLE_S = 5.0
_PRINT = (
    "import time\n"
    "due = time.monotonic()\n"
    "console = open('/dev/console', 'w')\n"
    "while True:\n"
    "    print('one line of the many that this guest has to say', file=console, flush=True)\n"
    f"    due += 1 / {LINES_PER_S}\n"
    "    time.sleep(max(0, due - time.monotonic()))\n"
)


async def healthz_printing() -> list[Figure]:
    """The 99th percentile of `/healthz` while twenty guests print a hundred lines a second each."""
    current_image()
    names = [f"p{number}" for number in range(VMS)]
    with volantd("--templates", "auto") as daemon:
        async with daemon.http() as http:
            body = {"cpu_cores": 1, "memory_mb": WANTED.memory_mb}
            for name in names:
                # The first one makes the template for the others.
                how = {"boot": "template"}
                made = await http.post(
                    f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json={"name": name, **body, **how},
                    timeout=2 * BOOT_S,
                )  # fmt: skip
                if made.headers.get("volant-wait") != "met":
                    raise RuntimeError(f"the VM did not boot: {made.text}")
            quiet = await probe(daemon)
            with _sockets() as sockets:
                for name in names:
                    _begun(daemon, _printing(daemon, name), sockets)
                await trio.sleep(_SETTLE_S)
                busy = await probe(daemon)
            for name in names:
                (await http.delete(f"/api/v1/vms/{name}", timeout=90)).raise_for_status()
    p99, before = 1000 * percentile(busy, 99), 1000 * percentile(quiet, 99)
    return [
        Figure(
            "healthz_p99_printing", p99, "ms", p99 / before, f"the {before:.3g} ms beside {VMS} silent guests; "
            f"{LINES_PER_S} lines a second each; median {1000 * median(busy):.2g} ms", within=TARGET_MS,
        )
    ]  # fmt: skip


def _printing(daemon: Daemon, name: str) -> bytes:
    body = json.dumps({"command": ["python3", "-c", _PRINT]}).encode()
    head = (
        f"POST /api/v1/vms/{name}/agent/v1/exec HTTP/1.1\r\nHost: {urlsplit(daemon.base_url).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
