"""Linters find no error in the OpenAPI document, and generated clients work with a real daemon and a real guest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from tests.conformance.kit import JS, Node
from tests.system.kit import BOOT_S, Daemon
from volant.api._openapi import document

HERE = Path(__file__).parent
TOOL_S = 120.0


def tool(node: Node, name: str, *arguments: str, cwd: Path) -> str:
    """Runs a command of `js/node_modules`; returns its output."""
    return checked([str(node.program), str(JS / "node_modules" / name), *arguments], node.environ, cwd)


def checked(command: Sequence[str], environ: Mapping[str, str], cwd: Path, timeout_s: float = TOOL_S) -> str:
    env = {**os.environ, **environ, "REDOCLY_TELEMETRY": "off"}
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, f"{command}:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "openapi.json"
    path.write_text(json.dumps(document()))
    return path


def test_spectral_and_redocly_find_no_error(node: Node, written: Path) -> None:
    home = written.parent
    (home / "ruleset.yaml").write_text('extends: ["spectral:oas"]\n')
    (home / "redocly.yaml").write_text("extends: [recommended]\n")
    spectral = "@stoplight/spectral-cli/dist/index.js"
    tool(node, spectral, "lint", str(written), "-r", "ruleset.yaml", "--fail-severity=error", cwd=home)
    tool(node, "@redocly/cli/bin/cli.js", "lint", str(written), "--config", "redocly.yaml", cwd=home)


async def test_a_client_of_openapi_python_client_works(written: Path, daemon: Daemon) -> None:
    command = [sys.executable, "-m", "openapi_python_client", "generate", "--meta", "none", "--path", str(written)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    home = written.parent
    said = checked([*command, "--output-path", str(home / "volant_client")], {"PATH": path}, home)
    for failure in ("Endpoint will not be generated", "Unable to process schema", "Failure to process"):
        assert failure not in said, said[-6000:]
    script = [sys.executable, str(HERE / "generated_python.py"), str(home), daemon.base_url]
    told = json.loads(checked(script, {}, home, BOOT_S))
    ran = [json.loads(line) for line in told.pop("ran").splitlines()]
    assert told == {
        "made": "running", "listed": ["python"], "got": [1, 256], "written": 201, "read": "generated", "gone": 204,
    }  # fmt: skip
    assert b64decode(ran[0]["data"]) == b"generated"
    assert ran[-1] == {"exit_code": 0}


@pytest.mark.full
async def test_a_client_of_openapi_typescript_works(node: Node, written: Path, daemon: Daemon) -> None:
    home = written.parent
    (home / "node_modules").symlink_to(JS / "node_modules")
    (home / "package.json").write_text('{"type": "module"}')
    shutil.copy(JS / "openapi_client.ts", home / "client.ts")
    tool(node, "openapi-typescript/bin/cli.js", str(written), "-o", "types.d.ts", cwd=home)
    options = ["--noEmit", "--strict", "--allowImportingTsExtensions", "--target", "esnext", "--module", "nodenext"]
    tool(node, "typescript/bin/tsc", *options, "client.ts", cwd=home)
    told = json.loads(checked([str(node.program), "client.ts", daemon.base_url], node.environ, home, BOOT_S))
    assert told == {"made": "running", "listed": ["typescript"], "got": [1, 256], "file": "root", "gone": 204}
