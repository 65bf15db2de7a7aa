"""The daemon starts fast: it imports what it needs later when it needs it."""

from __future__ import annotations

import subprocess
import sys

import pytest

LATER = {
    *("quart", "flask", "werkzeug", "jinja2", "asyncio", "httpx", "mcp", "pyroute2", "prometheus_client"),
    *("http.client", "urllib.request", "tarfile", "zstandard", "volant.images._build", "volant.guest"),
    *("volant.oci._images", "volant.oci._fetch", "volant.oci._layers", "volant.oci._skopeo", "volant.oci._store"),
    *("volant.oci._config", "volant.oci._manifest", "volant.oci._reference"),
}


@pytest.mark.programs
def test_a_start_imports_no_module_that_is_needed_later() -> None:
    program = "import sys, volant.daemon._program; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    imported = set(done.stdout.split())
    assert "volant.http" in imported
    assert not imported & LATER
