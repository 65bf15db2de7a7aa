"""Registries for tests: Debian's `docker-registry` with authentication, and one that fails on purpose."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Self

import pytest

from tests.ports import free_port
from tests.web_server import WebServer, answer

USER, PASSWORD = "puller", "a secret"
# Made by bcrypt from the password, at its lowest cost.
_HTPASSWD = f"{USER}:$2b$04$i.03Hk2e4WIYPH3vuwqN9.vOLEdlX3wrBDKpaNrcJdHjok3NqIpUK\n"
_CONFIG = """
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {directory}/data}}}}
http: {{addr: "127.0.0.1:{port}", secret: none}}
"""
_AUTHENTICATES = "auth: {{htpasswd: {{realm: tests, path: {directory}/htpasswd}}}}\n"
_START_S = 20.0
needs_registry = pytest.mark.skipif(
    not all(map(shutil.which, ("docker-registry", "skopeo", "mkfs.erofs", "fsck.erofs"))),
    reason="docker-registry, skopeo or erofs-utils is not installed",
)


class Registry:
    """A real registry on the loopback. `authenticates`: whether it wants the password."""

    def __init__(self, directory: Path, *, authenticates: bool = True) -> None:
        self._directory = directory
        self.address = f"127.0.0.1:{free_port()}"
        directory.mkdir()
        (directory / "htpasswd").write_text(_HTPASSWD)
        port = self.address.rpartition(":")[2]
        config = _CONFIG + (_AUTHENTICATES if authenticates else "")
        (directory / "config.yml").write_text(config.format(directory=directory, port=port))
        self.auth = auth_file(self.address, PASSWORD)

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            ["docker-registry", "serve", str(self._directory / "config.yml")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "OTEL_TRACES_EXPORTER": "none"},
        )
        give_up_at = time.monotonic() + _START_S
        while not self._answers():
            assert self._process.poll() is None
            assert time.monotonic() < give_up_at
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self) -> None:
        """Returns when it has ended."""
        self._process.wait()

    def push(self, layout: Path, name: str, *options: str, tag: str = "t") -> None:
        """Pushes an image of an OCI layout."""
        auth = self._directory / "push.json"
        auth.write_bytes(self.auth)
        command = ["skopeo", "copy", "--quiet", "--dest-tls-verify=false", "--dest-authfile", str(auth), *options]
        subprocess.run([*command, f"oci:{layout}:{tag}", f"docker://{self.address}/{name}"], check=True, timeout=60)

    def blob(self, digest: str) -> Path:
        """Returns the file in which the registry keeps a blob."""
        name = digest.removeprefix("sha256:")
        return self._directory / "data/docker/registry/v2/blobs/sha256" / name[:2] / name / "data"

    def _answers(self) -> bool:
        try:
            urllib.request.urlopen(f"http://{self.address}/v2/", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 401
        except OSError:
            return False
        return True


def auth_file(address: str, password: str) -> bytes:
    """Returns the content of an auth file."""
    word = base64.b64encode(f"{USER}:{password}".encode()).decode()
    return json.dumps({"auths": {address: {"auth": word}}}).encode()


class FailingRegistry(WebServer):
    """Serves the image of an OCI layout as `app:t`. `fails` decides about each request; False: it is answered."""

    def __init__(self, layout: Path, fails: Callable[[BaseHTTPRequestHandler], bool]) -> None:
        super().__init__(protocol="HTTP/1.1")
        self._blobs = layout / "blobs" / "sha256"
        self._image = json.loads((layout / "index.json").read_text())["manifests"][0]
        self._fails = fails
        self.address = f"127.0.0.1:{self.port}"
        self.requests: list[str] = []
        self.released = threading.Event()

    def get(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append(request.path)
        if self._fails(request):
            return
        if request.path == "/v2/":
            return answer(request, 200)
        kind, name = request.path.split("/")[-2:]
        digest = self._image["digest"] if name == "t" else name
        data = (self._blobs / digest.removeprefix("sha256:")).read_bytes()
        type_ = self._image["mediaType"] if kind == "manifests" else "application/octet-stream"
        answer(request, 200, data, Content_Type=type_)

    def __exit__(self, *_: object) -> None:
        self.released.set()
        super().__exit__()
