"""Takes the pictures of the web console in docs/images from a real daemon: `python docs/screenshots.py`.

So they never show what is not there. It takes some minutes, and needs QEMU, Chromium and the packages of
`tests/conformance/js`.
"""

from __future__ import annotations

from pathlib import Path

import httpx

from tests.conformance.kit import installed_node
from tests.conformance.test_console import play
from tests.system.kit import Daemon, cache_dir

IMAGES = Path(__file__).resolve().parent / "images"
_PATIENCE_S = 300.0


def main() -> None:
    """Writes `console-light.png` and `console-dark.png`."""
    IMAGES.mkdir(exist_ok=True)
    daemon = Daemon(cache_dir(), "--templates", "auto")
    try:
        daemon.start()
        with httpx.Client(base_url=f"{daemon.base_url}/api/v1", timeout=_PATIENCE_S) as client:
            _post(client, "templates", memory_mb=128)
            for name, labels in (
                ("web-1", {"team": "shop", "tier": "front"}),
                ("web-2", {"team": "shop", "tier": "front"}),
                ("queue", {"team": "shop"}),
                ("solver", {"team": "search"}),
            ):
                _post(client, "vms?wait=running", name=name, memory_mb=128, labels=labels)
            _post(client, "vms?wait=crashed", name="nightly", memory_mb=128, kernel_cmdline="rdinit=/none")
            _post(client, "vms/queue/pause?wait=paused")
            play(
                installed_node(),
                "pictures",
                daemon.base_url,
                {"overview": lambda: _busy(client), "forks": lambda: _fork(client)},
                *(str(IMAGES / f"console-{colours}.png") for colours in ("light", "dark")),
            )
    finally:
        daemon.dispose()


def _busy(client: httpx.Client) -> None:
    """Makes something happen while the page looks."""
    _post(client, "vms/web-2/restart?wait=running")
    _post(client, "vms/queue/resume?wait=running")


def _fork(client: httpx.Client) -> None:
    _post(client, "vms/solver/snapshots", name="prepared")
    _post(client, "vms/solver/fork?wait=running", names=["try-1", "try-2", "try-3"])
    _post(client, "vms/try-2/fork?wait=running", names=["try-2a", "try-2b"])
    _post(client, "vms/try-2b/snapshots", name="solved")
    client.delete("vms/try-1").raise_for_status()
    _post(client, "vms/try-3/pause?wait=paused")
    _post(client, "vms?wait=running", name="again", from_snapshot="solved")
    client.delete("vms/try-2a").raise_for_status()


def _post(client: httpx.Client, path: str, **body: object) -> None:
    client.post(path, json=body).raise_for_status()


if __name__ == "__main__":
    main()
