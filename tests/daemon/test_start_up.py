"""The daemon starts fast: it serves before it imports what only requests need."""

from __future__ import annotations

import subprocess
import sys

import pytest

LATER = {"quart", "flask", "werkzeug", "jinja2", "asyncio", "httpx", "mcp", "pyroute2", "prometheus_client"}


@pytest.mark.programs
def test_a_start_imports_no_library_that_only_requests_need() -> None:
    program = "import sys, volant.daemon._program; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    imported = set(done.stdout.split())
    assert "volant.http" in imported
    assert not imported & LATER
