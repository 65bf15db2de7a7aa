"""`volar debug bundle` of a daemon with guests contains what a report needs, and no secrets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.cli.test_debug import members
from tests.system.kit import REPOSITORY, Daemon, boot, kill_hypervisor, run, spec, until

KEY = "hush-api-key-0123456789abcdef"
SECRETS = (KEY, *(f"hush-{name}-c0ffee" for name in ("env", "label", "cmdline", "console", "query", "ticket")))


def bundle(daemon: Daemon, path: Path, *words: str) -> dict[str, str]:
    command = [sys.executable, "-m", "volant.cli.main", "--json", "debug", "bundle", "--output", str(path)]
    environ = {**os.environ, "VOLANT_API_BASE": daemon.base_url, "VOLANT_API_KEY": KEY}
    done = subprocess.run(
        [*command, "--log", str(daemon.log_path), *words],
        env=environ, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)
    found = members(path)
    assert sorted(json.loads(done.stdout)["members"]) == sorted(found.keys() - {"README.txt"})
    return found


async def test_the_bundle_has_what_a_report_needs_and_no_secret(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = make_daemon(environ={"VOLANT_API_KEY": KEY})
    async with daemon.client() as client:
        await boot(
            client,
            "demo",
            env={"TOKEN": "hush-env-c0ffee"},
            labels={"team": "hush-label-c0ffee"},
            # The kernel prints its command line on the console.
            kernel_cmdline="volant.note=hush-cmdline-c0ffee",
        )
        async with httpx.AsyncClient(base_url=daemon.base_url, trust_env=False) as http:
            for query in (f"api_key={KEY}", "api_key=hush-query-c0ffee", "ticket=hush-ticket-c0ffee"):
                async with http.stream("GET", f"/api/v1/events/vms?{query}"):
                    pass
        await run(client, "demo", "sh", "-c", "echo hush-console-c0ffee > /dev/console")
        kill_hypervisor(await client.vms.get("demo"))
        await until(client, "demo", "crashed")
        await client.vms.create(spec("other"))

        found = bundle(daemon, tmp_path / "bundle.tar.gz")
        for secret in SECRETS:
            assert [name for name, text in found.items() if secret in text] == [], secret
        assert json.loads(found["daemon/status.json"])["status"] == "ok"
        assert json.loads(found["daemon/info.json"])["settings"]["max_vms"] is None
        assert "volant/daemon/_daemon.py" in found["daemon/tasks.txt"]
        assert "volant_healthy 1.0" in found["daemon/metrics.txt"]
        assert {vm["name"] for vm in json.loads(found["vms.json"])} == {"demo", "other"}
        inspected = json.loads(found["inspect/demo.json"])
        assert inspected["vm"]["reason"]["code"] == "hypervisor_killed"
        assert list(inspected["vm"]["labels"]) == ["team"]
        events = [json.loads(line)["type"] for line in found["events.ndjson"].splitlines()]
        assert events[:3] == ["VM_CREATED", "VM_STARTING", "VM_RUNNING"]
        assert "VM_CRASHED" in events
        assert "GET /api/v1/events/vms" in found["log.txt"]
        assert "consoles" in found["README.txt"]
        assert str(daemon.state_dir / "volant.db") in found["files.txt"]

        # The output of guests is included on request.
        found = bundle(daemon, tmp_path / "with-consoles.tar.gz", "--consoles")
        assert "hush-console-c0ffee" in found["consoles/demo.txt"]
        assert not any(KEY in text for text in found.values())
