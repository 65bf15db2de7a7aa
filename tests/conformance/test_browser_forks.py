"""Each fork of a VM with a running browser keeps the open pages and is independent from then on."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.system.kit import BOOT_S, Daemon, load

FORKS = load("VOLANT_TEST_FORKS", usual=1, full=10)
PAGE = "http://localhost:8000/"
ELSEWHERE = "http://127.0.0.1:8000/"
"""Another site, for which Chromium starts a new process. The process of the old page would continue with the random
numbers of the original."""
NONE_IN_STORE = {"CHROMIUM_FLAGS": "--disable-features=SpareRendererForSitePerProcess"}
NUMBERS = "[Math.random(), crypto.getRandomValues(new Uint32Array(4)).join()]"


def test_forks_of_a_browser_answer_and_are_independent(
    browser_plugin: Path, make_daemon: Callable[..., Daemon]
) -> None:
    daemon = make_daemon()
    with httpx.Client(base_url=daemon.base_url, trust_env=False, timeout=2 * BOOT_S) as http:
        http.post("/api/v1/plugins", json=json.loads(browser_plugin.read_text())).raise_for_status()
        web = {"name": "web", "plugin": "browser", "cpu_cores": 2, "memory_mb": 1024, "env": NONE_IN_STORE}
        http.post("/api/v1/vms?wait=running&timeout=2m", json=web).raise_for_status()
        devtools(http, "web")
        serve = {"command": ["httpd", "-p", "127.0.0.1:8000", "-h", "/srv/www"]}
        assert '"exit_code": 0' in http.post("/api/v1/vms/web/agent/v1/exec", json=serve).text
        act(http, "web", "navigate", url=PAGE)
        assert "<h1>It works</h1>" in act(http, "web", "content")["html"]
        for action, begin in (("screenshot", b"\x89PNG"), ("pdf", b"%PDF-")):
            assert called(http, "web", action).content.startswith(begin), action

        forked = http.post("/api/v1/vms/web/fork?wait=running&timeout=2m", json={"count": FORKS})
        assert (forked.status_code, forked.headers["volant-wait"]) == (201, "met"), forked.text
        copies = [vm["name"] for vm in forked.json()]
        assert len(set(copies)) == FORKS
        for name in ("web", *copies):
            devtools(http, name)
            assert PAGE in pages(http, name), name
            assert act(http, name, "evaluate", expression="document.title")["value"] == "It works"

        # A change in one is not visible in another.
        for name in copies:
            http.put(f"/ws/v1/vms/{name}/devtools/json/new?about:blank%23{name}").raise_for_status()
        for name in ("web", *copies):
            marked = {url for url in pages(http, name) if url.startswith("about:blank#")}
            assert marked == ({f"about:blank#{name}"} if name in copies else set())

        numbers = {}
        for name in ("web", *copies):
            act(http, name, "navigate", url=ELSEWHERE)
            numbers[name] = act(http, name, "evaluate", expression=NUMBERS)["value"]
        for each in zip(*numbers.values(), strict=True):
            assert len(set(each)) == 1 + FORKS, numbers


def devtools(http: httpx.Client, name: str) -> None:
    """Waits until the browser of a VM answers."""
    deadline = time.monotonic() + BOOT_S
    while http.get(f"/ws/v1/vms/{name}/devtools/json/version").status_code != 200:
        assert time.monotonic() < deadline, name
        time.sleep(0.2)


def pages(http: httpx.Client, name: str) -> list[str]:
    """Returns the addresses of the open pages."""
    found = http.get(f"/ws/v1/vms/{name}/devtools/json/list").raise_for_status().json()
    return [page["url"] for page in found]


def called(http: httpx.Client, name: str, action: str, **arguments: Any) -> httpx.Response:
    """Calls an action of the browser."""
    answer = http.post(f"/api/v1/vms/{name}/actions/browser/{action}", json={"timeout_s": 100, **arguments})
    assert answer.status_code == 200, answer.text
    return answer


def act(http: httpx.Client, name: str, action: str, **arguments: Any) -> dict[str, Any]:
    """Calls an action of the browser; returns its answer."""
    said: dict[str, Any] = called(http, name, action, **arguments).json()
    return said
