"""The official MCP clients of both protocol versions drive VMs, and the official suite finds no unlisted failure."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.conformance.kit import Node
from tests.system.kit import Daemon
from volant.mcp._text import MAX_TEXT
from volant.mcp._tools import tools
from volant.operations import TABLE

HERE = Path(__file__).parent
NOT_APPLICABLE = HERE / "mcp_not_applicable.json"
"""By version: the scenario, perhaps one check of it, and why it does not apply to this server."""
CLIENT_S = 400.0
_INSTALL_S = 300.0


@pytest.fixture(scope="session")
def old_python(image_cache: Path) -> Path:
    """A Python with the client of the old protocol, made once from its lock."""
    lock = HERE / "mcp1" / "requirements.lock"
    digest = hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()[:16]
    home = image_cache / f"mcp1-{digest}"
    python = home / "bin" / "python"
    with (image_cache / "mcp1.lock").open("w") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        if not (home / "made").exists():
            shutil.rmtree(home, ignore_errors=True)
            subprocess.run([sys.executable, "-m", "venv", home], check=True, timeout=_INSTALL_S)
            install: list[str | Path] = [
                python,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--require-hashes",
                "--no-deps",
                "-r",
                lock,
            ]
            subprocess.run(install, check=True, timeout=_INSTALL_S)
            (home / "made").touch()
    return python


def drive_python(python: str | Path, url: str, name: str) -> Any:
    done = subprocess.run(
        [python, HERE / "mcp_drive.py", url, name],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CLIENT_S,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)


def check(seen: Any, name: str, version: str) -> None:
    """Checks the report of a client."""
    assert seen["version"] == version
    assert seen["tools"] == [tool.name for tool in tools(TABLE)]
    assert seen["created"]["outcome"] == "done"
    assert (seen["created"]["vm"]["name"], seen["created"]["vm"]["status"]) == (name, "running")
    assert any(name in message for message in seen["progress"]), seen["progress"]
    assert (seen["ran"]["exit_code"], seen["ran"]["stdout"], seen["ran"]["stderr"]) == (3, "out\n", "err\n")
    assert (seen["read"]["content"], seen["read"]["encoding"], seen["read"]["truncated"]) == ("grüße\n", "utf-8", False)
    whole = "".join(f"{number}\n" for number in range(1, 100_001))
    long = seen["long"]
    assert long["truncated"]
    assert long["stdout_bytes"] == len(whole)
    head, marker, tail = long["stdout"].partition("\n[… ")
    assert marker
    assert len(head) > 20_000
    assert whole.startswith(head)
    assert whole.endswith(tail.partition("]\n")[2])
    assert len(seen["long_text"].encode()) <= MAX_TEXT
    assert 1 <= len(seen["logs"]["lines"]) <= 5
    assert seen["logs"]["lines"][-1]["name"] == name
    assert seen["logs"]["lines"][0]["line"] in seen["resource"]
    assert seen["deleted"] == {"name": name, "deleted": True}
    assert seen["missing"]["isError"] is True
    assert f"there is no VM named '{name}'" in seen["missing"]["content"][0]["text"]


async def test_the_python_client_of_the_new_protocol(daemon: Daemon) -> None:
    url = f"{daemon.base_url}/api/v1/mcp"
    # In another process: the client (2.3) leaves partly read streams to the garbage collector.
    seen = await trio.to_thread.run_sync(drive_python, sys.executable, url, "py-new")
    check(seen, "py-new", "2026-07-28")


@pytest.mark.full
async def test_the_python_client_of_the_old_protocol(daemon: Daemon, old_python: Path) -> None:
    url = f"{daemon.base_url}/api/v1/mcp"
    seen = await trio.to_thread.run_sync(drive_python, old_python, url, "py-old")
    check(seen, "py-old", "2025-11-25")


@pytest.mark.parametrize(
    ("script", "name", "version"),
    [("mcp_v1.mjs", "ts-old", "2025-11-25"), ("mcp_v2.mjs", "ts-new", "2026-07-28")],
)
async def test_the_typescript_clients(daemon: Daemon, node: Node, script: str, name: str, version: str) -> None:
    url = f"{daemon.base_url}/api/v1/mcp"
    (seen,) = await trio.to_thread.run_sync(partial(node.run, script, url, name, timeout_s=CLIENT_S))
    check(seen, name, version)


@pytest.mark.parametrize("version", ["2025-06-18", "2025-11-25", "2026-07-28"])
def test_the_conformance_suite(daemon: Daemon, node: Node, version: str) -> None:
    """Every check passes, or is listed in `mcp_not_applicable.json` with the reason; listed ones do fail.

    The file also lists scenarios that pass only because they found nothing to check.
    """
    excused = json.loads(NOT_APPLICABLE.read_text())[version]
    ran = node.run("mcp_suite.mjs", f"{daemon.base_url}/api/v1/mcp", version, timeout_s=180)
    passed = set()
    failed: dict[str, Any] = {}
    for scenario in ran:
        name, checks = scenario["scenario"], scenario["checks"]
        wrong = {f"{name}/{check['id']}": check["errorMessage"] for check in checks if check["status"] == "FAILURE"}
        if not wrong and any(check["status"] == "SUCCESS" for check in checks):
            passed.add(name)
        failed |= wrong or ({name: "it has checked nothing"} if name not in passed else {})
    assert {name: why for name, why in failed.items() if name not in excused} == {}
    assert excused.keys() - failed.keys() == set(), "these pass or do not run, and need no reason"
    assert APPLY[version] <= passed, "the suite does not run what it is here for"


def test_extensions_of_the_protocol_are_not_spoken(node: Node) -> None:
    excused = json.loads(NOT_APPLICABLE.read_text())["extension"]
    assert excused.keys() == set(node.run("mcp_suite.mjs", timeout_s=60))


APPLY = {
    "2025-06-18": {"server-initialize", "ping", "tools-list", "resources-list"},
    "2025-11-25": {"server-initialize", "ping", "tools-list", "resources-list", "dns-rebinding-protection"},
    "2026-07-28": {
        "tools-list", "resources-list", "sep-2164-resource-not-found", "http-header-validation",
        "dns-rebinding-protection",
    },
}  # fmt: skip
"""Scenarios that must exist and pass."""
