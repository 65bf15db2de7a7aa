"""Stock images are built without a registry, and people install packages in their VMs as they would elsewhere."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from tests.oci.registry import needs_registry
from tests.system.kit import Daemon, boot, run

pytestmark = [
    pytest.mark.full,
    needs_registry,
    pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed: .ci/system-packages network"),
]

BUILD_S = 600
INSTALL_S = 300.0
CERTIFICATES = "/tmp/certificates.pem"
APT = "apt-get update -q && apt-get install -q -y --no-install-recommends hello && hello"
PIP = f"pip install -q --cert {CERTIFICATES} six && python3 -c 'import six; print(six.__name__)'"
NPM = f"NODE_EXTRA_CA_CERTS={CERTIFICATES} npm install is-number && node -e 'console.log(require(\"is-number\")(3))'"


@pytest.mark.parametrize(
    ("name", "reference", "command", "shown"),
    [
        ("debian", "localhost/debian:13", APT, "Hello, world!"),
        ("python", "localhost/python:3.13", PIP, "six"),
        ("node", "localhost/node:20", f"cd /root && {NPM}", "true"),
    ],
)
def test_packages_are_installed_in_a_vm_of_it(
    daemon: Daemon, image_cache: Path, name: str, reference: str, command: str, shown: str
) -> None:
    build = [sys.executable, "-m", "volant.cli.main", "images", "build", name, "--cache", str(image_cache)]
    environ = {**os.environ, "VOLANT_API_BASE": daemon.base_url}
    built = subprocess.run(build, env=environ, capture_output=True, text=True, check=False, timeout=BUILD_S)
    assert built.returncode == 0, built.stderr
    assert f"volar run {reference}" in built.stdout
    trusted = ssl.get_default_verify_paths().cafile or "/etc/ssl/certs/ca-certificates.crt"
    certificates = Path(trusted).read_bytes()

    async def install() -> str:
        async with daemon.client() as client:
            await boot(client, "demo", image=reference, network="user", memory_mb=512, start_workload=False)
            # A company's proxy, say, signs what this host fetches with a key of its own.
            await client.vms.write_file("demo", CERTIFICATES, certificates)
            return await run(client, "demo", "sh", "-c", command, timeout_s=INSTALL_S)

    assert trio.run(install).splitlines()[-1] == shown
