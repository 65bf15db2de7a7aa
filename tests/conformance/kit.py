"""Helpers for tests that drive clients that this project did not write."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
