"""Checks that `requirements.lock` was made from the present `pyproject.toml` files, without network access.

`--stamp` writes a digest of the dependencies into the first line of the lock; without it, that line is checked.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECTS = (".", "actors", "packaging/client")
PREFIX = "# Made by `make lock` from the dependencies with the digest "


def main() -> int:
    """Checks or stamps; returns the exit code."""
    projects = [tomllib.loads((ROOT / path / "pyproject.toml").read_text()) for path in PROJECTS]
    facts = [[project["project"][key] for key in ("requires-python", "dependencies")] for project in projects]
    facts.append(projects[0]["dependency-groups"])
    line = PREFIX + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    lock = ROOT / "requirements.lock"
    text = lock.read_text()
    if "--stamp" in sys.argv[1:]:
        lock.write_text(line + "\n" + text)
        return 0
    if text.partition("\n")[0] != line:
        print("requirements.lock is out of date: run `make lock`", file=sys.stderr)
        return 1
    pinned = re.findall(r"^([A-Za-z0-9._-]+)==\S+(.*)$", text, re.MULTILINE)
    bare = [name for name, rest in pinned if not rest.rstrip().endswith("\\")]
    if not pinned or bare or "://" in text:
        print(f"requirements.lock has an address, or lacks hashes: {', '.join(bare)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
