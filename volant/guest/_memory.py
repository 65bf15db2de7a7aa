"""The guest's memory, from `/proc/meminfo`."""

# ruff: noqa: PTH123 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations


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
