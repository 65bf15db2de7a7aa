"""Finds what daemons and guests leave on a host: processes, sockets, network devices, files outside the caches,
control groups that are frozen.

`check_leftovers.py before FILE` records the present ones; `check_leftovers.py after FILE` fails if there are new ones.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

_GRACE_S = 10.0
_OURS = re.compile(r"volant|^vt\.|^pytest-of-")


def main() -> int:
    """Records or compares; returns the exit code."""
    mode, file = sys.argv[1], Path(sys.argv[2])
    if mode == "before":
        file.write_text(json.dumps({name: sorted(probe()) for name, probe in PROBES.items()}))
        return 0
    before = json.loads(file.read_text())
    give_up_at = time.monotonic() + _GRACE_S
    while True:
        left = {name: sorted(set(probe()) - set(before[name])) for name, probe in PROBES.items()}
        if not any(left.values()):
            print("Nothing is left: no process, socket, network device, control group or file outside the caches")
            return 0
        if time.monotonic() > give_up_at:
            break
        time.sleep(0.5)
    for name, found in left.items():
        for one in found:
            print(f"left behind: {name}: {one}", file=sys.stderr)
    return 1


def _processes() -> set[str]:
    found = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if command.startswith(("qemu-system", "/usr/bin/qemu-system")) or any(
            word in command for word in ("volantd", "/host/_watchdog.py ")
        ):
            found.add(f"{folder.name} {command[:200]}")
    return found


def _sockets() -> set[str]:
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    paths = (fields[7] for line in lines if len(fields := line.split(maxsplit=7)) == 8)
    return {path for path in paths if path.startswith("/tmp/") or "volant" in path}


def _devices() -> set[str]:
    return {path.name for path in Path("/sys/class/net").iterdir()}


def _files() -> set[str]:
    found = set()
    for base in map(Path, ("/tmp", "/dev/shm", "/run", "/var/lib", "/var/tmp")):
        if base.is_dir():
            found |= {str(path) for path in base.iterdir() if _OURS.search(path.name)}
    return found


def _groups() -> set[str]:
    places = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
    return {str(path) for place in places for path in place.glob("volant-*-movable")}


PROBES: dict[str, Callable[[], set[str]]] = {
    "process": _processes,
    "socket": _sockets,
    "network device": _devices,
    "file": _files,
    "control group": _groups,
}

if __name__ == "__main__":
    sys.exit(main())
