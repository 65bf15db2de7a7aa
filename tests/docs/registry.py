"""A registry for the pages that use images: in their network namespace it stands for Docker's.

Run in the background by a comment of a page. It serves `busybox` and `httpd`, which are made here of BusyBox, and
makes the file `registry-ready` in the home directory once they can be fetched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.oci.kit import tar, write_layout
from tests.oci.registry import Registry
from tests.system.rootfs import busybox
from volant.oci import DEFAULT_REGISTRY

_MIRROR = '[[registry]]\nprefix = "{registry}"\nlocation = "{address}"\ninsecure = true\n'
_SERVE = b"#!/bin/sh\nexec httpd -f -p 80 -h /srv\n"


def main() -> None:
    """Serves until SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    program = busybox(Path(os.environ["VOLANT_CACHE_DIR"]))
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        binary = directory / "busybox"
        binary.write_bytes(program)
        binary.chmod(0o755)
        applets = subprocess.run([binary, "--list"], check=True, stdout=subprocess.PIPE, text=True, timeout=20).stdout
        links = [(f"bin/{name}", {"to": "busybox"}) for name in applets.split() if name != "busybox"]
        base = tar(
            ("bin", {}), ("bin/busybox", {"data": program, "mode": 0o755}), *links, ("etc", {}), ("root", {}),
            ("etc/passwd", {"data": b"root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n"}),
            ("etc/group", {"data": b"root:x:0:\nnobody:x:65534:\n"}), ("tmp", {"mode": 0o1777}),
        )  # fmt: skip
        site = tar(
            ("srv", {}), ("srv/index.html", {"data": b"It works!\n"}),
            ("bin/httpd-foreground", {"data": _SERVE, "mode": 0o755}),
        )  # fmt: skip
        layout = directory / "layouts"
        path = ["PATH=/bin"]
        images = {
            "busybox": write_layout(layout / "busybox", [base], Cmd=["sh"], Env=path),
            "httpd": write_layout(
                layout / "httpd", [base, site], Cmd=["httpd-foreground"], Env=path, ExposedPorts={"80/tcp": {}}
            ),
        }
        with Registry(directory / "registry", authenticates=False) as registry:
            for name, image in images.items():
                registry.push(image.layout, f"library/{name}:latest")
            mirror = Path("/etc/containers/registries.conf.d/volant-docs.conf")
            mirror.parent.mkdir(parents=True, exist_ok=True)
            mirror.write_text(_MIRROR.format(registry=DEFAULT_REGISTRY, address=registry.address))
            (Path.home() / "registry-ready").touch()
            registry.wait()


if __name__ == "__main__":
    main()
