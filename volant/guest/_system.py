"""Small helpers for PID 1 and the agent."""

# ruff: noqa: PTH123 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os


def memory() -> dict[str, int]:
    """Returns `total_mb` and `available_mb`; zeros if unknown."""
    found = {"total_mb": 0, "available_mb": 0}
    try:
        with open("/proc/meminfo") as handle:
            for line in handle:
                name, _, rest = line.partition(":")
                if name == "MemTotal":
                    found["total_mb"] = int(rest.split()[0]) // 1024
                elif name == "MemAvailable":
                    found["available_mb"] = int(rest.split()[0]) // 1024
    except (OSError, ValueError, IndexError):
        pass
    return found


GRACE_FILE = "/run/volant/grace"
"""The file to which the agent writes the grace period of a shutdown, in seconds, before it signals PID 1."""
WORKLOAD_FILE = "/run/volant/workload"
"""The file with the number of the workload's session while it runs. PID 1 does not signal that session at a shutdown:
the agent does, with the workload's own stop signal."""


def say(text: str) -> None:
    """Writes a line to the console."""
    try:
        os.write(2, f"volant: {text}\n".encode(errors="replace"))
    except OSError:
        pass


def read_text(path: str, limit: int = 4096) -> str:
    """Returns the first `limit` characters of a file, stripped; an empty text if it can't be read."""
    try:
        with open(path) as handle:
            return handle.read(limit).strip()
    except OSError:
        return ""


def kernel_parameters() -> list[str]:
    """Returns the words of the kernel's command line."""
    return read_text("/proc/cmdline", 65536).split()


def kernel_parameter(name: str) -> str:
    """Returns the last value of a kernel parameter, or an empty text."""
    words = [word for word in kernel_parameters() if word.startswith(name + "=")]
    return words[-1][len(name) + 1 :] if words else ""
