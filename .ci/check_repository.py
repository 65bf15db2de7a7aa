"""Checks that no file of the repository names a package registry's host or a path of this machine."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# In pieces, because this file must not name them either.
_HOSTS = [
    ("pypi", "org"),
    ("pythonhosted", "org"),
    ("deb", "debian", "org"),
    ("security", "debian", "org"),
    ("snapshot", "debian", "org"),
    ("registry", "npmjs", "org"),
    ("ghcr", "io"),
    ("docker", "io"),
    ("proxy", "golang", "org"),
]
_HOST = re.compile("|".join(re.escape(".".join(parts)) for parts in _HOSTS))
_PLACES = {str(ROOT), "/" + "work", str(Path.home())} - {"/", "/" + "root"}
_PATHS = re.compile("|".join(rf"{re.escape(place)}/\w" for place in sorted(_PLACES)))
_MAX_BYTES = 5_000_000


def main() -> int:
    """Prints each occurrence; returns the exit code."""
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    found = 0
    for name in filter(None, listed.decode().split("\0")):
        path = ROOT / name
        if not path.is_file():
            continue
        if path.stat().st_size > _MAX_BYTES:
            found += 1
            print(f"{name}: larger than {_MAX_BYTES} bytes", file=sys.stderr)
            continue
        text = path.read_bytes().decode(errors="replace")
        for number, line in enumerate(text.splitlines(), 1):
            for what, pattern in (("a registry's host", _HOST), ("a path of this machine", _PATHS)):
                if pattern.search(line):
                    found += 1
                    print(f"{name}:{number}: {what}: {line.strip()[:100]}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
