"""The browser plugin: its actions, as the how-to page calls them, and DevTools clients that this project did not write.

The clients open a page that the guest serves to itself, and take a screenshot; one of them in a message of more than
16 MiB.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.chromium import needs_chromium
from tests.conformance.kit import JS, Node
from tests.conformance.test_console import play
from tests.system.kit import BOOT_S, REPOSITORY, Daemon, kept, load

pytestmark = pytest.mark.full

CLIENT_S = 400.0
"""An emulated guest needs some fifteen seconds of processor time for such a screenshot."""
ACTION_S = 150.0
KEY = "conformance-0123456789abcdef"
SIXTEEN_MIB = 16 * 1024 * 1024
LARGE = ("puppeteer", "playwright", "mcp", "cri")[: load("VOLANT_TEST_SCREENSHOTS", usual=1, full=4)]
"""Clients that take the large screenshot."""
HOW_TO = REPOSITORY / "docs/how-to/run-a-browser.md"
ACTIONS = "/api/v1/vms/web/actions/browser"


@dataclass(frozen=True)
class Site:
    """A daemon with a VM called `web`, and a directory in which the commands of the how-to page have run."""

    daemon: Daemon
    config: Path
    folder: Path
    told: dict[str, str]
    """The output of each command of the how-to page."""

    @property
    def endpoint(self) -> str:
        return f"{self.daemon.base_url}/ws/v1/vms/web/devtools"

    def volar(self, line: str) -> str:
        """Runs a line in a shell; returns its output."""
        words = {"VOLANT_API_BASE": self.daemon.base_url, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["sh", "-c", line],
            env={**self.daemon.environ, **words},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=2 * BOOT_S,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.daemon.base_url, trust_env=False, timeout=ACTION_S)

    def reload(self, settings: str) -> None:
        """Restarts the daemon with these settings."""
        self.config.write_text(settings)
        before = self.daemon.log().count("reloaded")
        os.kill(self.daemon.pid, signal.SIGHUP)
        deadline = time.monotonic() + 30
        while self.daemon.log().count("reloaded") == before:
            assert time.monotonic() < deadline, self.daemon.log()
            time.sleep(0.05)


@pytest.fixture(scope="module")
def site(
    image_cache: Path, browser_plugin: Path, _running: list[Daemon], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("browser")
    (folder / "browser").symlink_to(browser_plugin.parent)
    config = folder / "volantd.toml"
    config.touch(0o600)
    with kept(Daemon(image_cache, "--config", str(config)), _running) as daemon:
        made = Site(daemon, config, folder, {})
        for line in commands():
            made.told[line] = made.volar(line)
        made.volar(f"volar vms cp {JS / 'devtools_page.html'} web:/srv/www/noise.html")
        yield made


def commands() -> list[str]:
    """Returns the commands of the how-to page, from the installation of the plugin to the last action."""
    text = HOW_TO.read_text().partition("## Make a VM of it")[2].partition("## Flags for Chromium")[0]
    return re.findall(r"^    (volar .*)$", text, re.MULTILINE)


def test_the_commands_of_the_how_to_page_work(site: Site) -> None:
    told = {line.partition(" web ")[2].partition(" ")[0]: text for line, text in site.told.items() if " call " in line}
    page = {"url": "http://localhost:8000/", "title": "It works"}
    navigated = json.loads(told["navigate"])
    assert navigated == {**page, "target": navigated["target"], "status": 200}
    assert json.loads(told["evaluate"]) == {"value": "It works", "type": "string"}
    content = json.loads(told["content"])
    assert content == {**page, "target": navigated["target"], "html": content["html"]}
    assert "<h1>It works</h1>" in content["html"]
    assert (site.folder / "page.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pdf = (site.folder / "page.pdf").read_bytes()
    assert pdf.startswith(b"%PDF-")
    assert pdf.rstrip().endswith(b"%%EOF")


@needs_chromium
def test_a_person_drives_the_browser_by_the_console(site: Site, node: Node) -> None:
    play(node, "driven", site.daemon.base_url, {}, "web", "screenshot")


def test_each_action_is_a_post(site: Site) -> None:
    with site.http() as http:
        manifest = http.get("/api/v1/plugins/browser/manifest").raise_for_status().json()
        bodies: dict[str, dict[str, Any]] = {
            "navigate": {"url": "data:text/html,<title>other</title><p>there", "timeout_s": 100},
            "evaluate": {"expression": "Promise.resolve([document.title, 6 * 7])"},
            "content": {},
            "screenshot": {"format": "webp", "width": 320, "height": 200},
            "pdf": {"paper": "a5"},
        }
        assert bodies.keys() == manifest["actions"].keys()
        answers = {name: http.post(f"{ACTIONS}/{name}", json=body) for name, body in bodies.items()}
        assert {name: answer.status_code for name, answer in answers.items()} == dict.fromkeys(bodies, 200)
        assert (answers["navigate"].json()["title"], answers["navigate"].json()["status"]) == ("other", None)
        assert answers["evaluate"].json() == {"value": ["other", 42], "type": "object"}
        assert "<p>there" in answers["content"].json()["html"]
        assert answers["screenshot"].headers["content-type"] == "image/webp"
        assert answers["screenshot"].content[8:12] == b"WEBP"
        assert answers["pdf"].content.startswith(b"%PDF-")
        # A guest's answer never runs in our origin, and errors of the caller are explained.
        assert all(answer.headers["content-security-policy"] == "sandbox" for answer in answers.values())
        for name, body, status, field in (
            ("navigate", {}, 400, "url"),
            ("navigate", {"url": "http://localhost:1/"}, 422, "url"),
            ("evaluate", {"expression": "throw 1"}, 422, "expression"),
            ("screenshot", {"target": "nobody"}, 404, "target"),
        ):
            refused = http.post(f"{ACTIONS}/{name}", json=body)
            assert (refused.status_code, refused.json()["field"]) == (status, field)
        paths = http.get("/api/v1/vms/web/openapi").raise_for_status().json()["paths"]
        assert {f"/{name}" for name in bodies} < paths.keys()


def test_playwright_and_puppeteer_at_once(site: Site, node: Node) -> None:
    found = json.loads(site.volar("volar --json vms devtools web"))
    assert found["endpoint"] == site.endpoint
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda client: drive(site, node, client), ("playwright", "puppeteer")))


def test_playwrights_mcp_server_and_chrome_remote_interface_with_a_key(site: Site, node: Node, tmp_path: Path) -> None:
    site.reload(f'api_key = "{KEY}"\n')
    try:
        assert httpx.get(f"{site.endpoint}/json/version", trust_env=False).status_code == 401
        drive(site, node, "mcp", str(tmp_path), KEY)
        # One after the other: a screenshot blocks Chromium longer than the ten seconds that the client waits for HTTP.
        drive(site, node, "cri", KEY)
    finally:
        site.reload("")
    assert KEY not in site.daemon.log()


def drive(site: Site, node: Node, client: str, *arguments: str) -> None:
    """Runs a client, and checks its report."""
    large = client in LARGE
    page = f"http://127.0.0.1:8000/noise.html{'' if large else '?small'}"
    (seen,) = node.run(f"devtools_{client}.mjs", site.endpoint, page, *arguments, timeout_s=CLIENT_S)
    assert seen["text"] == "inside 42"
    assert seen["width"] >= 1280
    assert seen["height"] > (3400 if large else 720)
    # The message contains it as Base64.
    assert not large or seen["bytes"] * 4 / 3 > SIXTEEN_MIB
