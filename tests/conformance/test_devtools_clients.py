"""Playwright, Puppeteer and the console drive a browser behind the relay and a real agent.

The browser is the host's Chromium; `test_browser_plugin` has them drive one in a guest.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.api.test_devtools import PREFIX, Tab, tab
from tests.chromium import needs_chromium, visiting
from tests.conformance.kit import JS, Node
from tests.conformance.test_console import play

pytestmark = [needs_chromium, pytest.mark.programs]

_S = 60.0
SIXTEEN_MIB = 16 * 1024 * 1024


@asynccontextmanager
async def chromium_as_tab(path: Path) -> AsyncIterator[Tab]:
    """Serves a VM called `tab` whose browser is a real one."""
    profile = path / "profile"
    async with visiting("about:blank", profile):
        with trio.fail_after(_S):
            while not (text := _read(profile / "DevToolsActivePort")):  # noqa: ASYNC110 - another process's file
                await trio.sleep(0.05)
        async with tab(path, port=int(text.split()[0])) as at:
            yield at


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


async def test_playwright_and_puppeteer_at_once(node: Node, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    async with chromium_as_tab(tmp_path) as at:
        endpoint = f"http://127.0.0.1:{at.api.server.port}{PREFIX}"

        async def drive(client: str) -> None:
            page = (JS / "devtools_page.html").as_uri()
            run = lambda: node.run(f"devtools_{client}.mjs", endpoint, page, timeout_s=_S)  # noqa: E731
            [seen[client]] = await trio.to_thread.run_sync(run)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drive, "playwright")
            nursery.start_soon(drive, "puppeteer")
    for client, its in seen.items():
        assert its["text"] == "inside 42", client
        # The message contains the picture as Base64.
        assert its["bytes"] * 4 / 3 > SIXTEEN_MIB, client
    assert len(seen) == 2


async def test_a_person_drives_a_browser_by_the_console(node: Node, tmp_path: Path) -> None:
    async with chromium_as_tab(tmp_path) as at:
        url = f"http://127.0.0.1:{at.api.server.port}"
        await trio.to_thread.run_sync(lambda: play(node, "driven", url, {}, "tab"))
