"""The entry point of `volar`. It imports nothing at first, so that an interrupt is met as early as it can be."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NoReturn


def run(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit code."""
    try:
        from ._volar import invoke

        return invoke(arguments)
    except KeyboardInterrupt:
        return 130


def main() -> NoReturn:
    """The command `volar`."""
    sys.exit(run())


if __name__ == "__main__":
    main()
