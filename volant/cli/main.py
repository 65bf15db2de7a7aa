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
    from ._streams import BROKEN_PIPE, OutputError, discard_output, prepare

    prepare()
    try:
        code = run()
        sys.stdout.flush()
    except OutputError as error:
        # What a command itself writes is caught there; this is the help, and the like.
        code = BROKEN_PIPE if error.broken_pipe else 1
        if not error.broken_pipe:
            sys.stderr.write(f"volar: {error}\n")
        discard_output()
    sys.exit(code)


if __name__ == "__main__":
    main()
