"""`volar debug bundle` has the daemon's answers in one file, and no secret."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

from tests.system.kit import Daemon, spec

KEY = "hush-api-key-0123456789abcdef"
SECRETS = (KEY, *(f"hush-{name}-c0ffee" for name in ("env", "query", "ticket")))


def bundle(path: Path, base_url: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "volant.cli.main", "--json", "debug", "bundle", "--output", str(path)]
    environ = {**os.environ, "VOLANT_API_BASE": base_url, "VOLANT_API_KEY": KEY}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def members(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        files = {member.name.partition("/")[2]: tar.extractfile(member) for member in tar.getmembers()}
        return {name: file.read().decode() for name, file in files.items() if file is not None}


async def test_the_bundle_has_the_answers_of_the_daemon_and_no_secret(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "cache", environ={"VOLANT_API_KEY": KEY})
    try:
        daemon.start()
        async with daemon.client() as client, daemon.http() as http:
            await client.vms.create(spec("demo", env={"TOKEN": "hush-env-c0ffee"}))
            for query in ("api_key=hush-query-c0ffee", "ticket=hush-ticket-c0ffee"):
                await http.get(f"/api/v1/events/vms?{query}")
        path = tmp_path / "bundle.tar.gz"
        done = bundle(path, daemon.base_url)
        assert done.returncode == 0, done.stderr
        assert path.stat().st_mode & 0o777 == 0o600
        found = members(path)
        assert json.loads(done.stdout) == {"path": str(path), "members": list(found), "missing": {}}
        for secret in SECRETS:
            assert [name for name, text in found.items() if secret in text] == [], secret
        assert json.loads(found["status.json"])["status"] == "ok"
        assert "settings" in json.loads(found["info.json"])
        assert "volant/daemon/_daemon.py" in found["tasks.txt"]
        assert "volant_healthy 1.0" in found["metrics.txt"]
        assert [vm["name"] for vm in json.loads(found["vms.json"])] == ["demo"]
        assert json.loads(found["inspect/demo.json"])["vm"]["name"] == "demo"
        assert [event["type"] for event in json.loads(found["events.json"])][:2] == ["VM_CREATED", "VM_STARTING"]

        assert bundle(path, daemon.base_url).returncode == 4
        assert members(path) == found
    finally:
        daemon.discard()
    assert bundle(tmp_path / "other.tar.gz", daemon.base_url).returncode == 5
    assert not (tmp_path / "other.tar.gz").exists()
