"""The entry point of `volar`. It imports few modules at first, so that it handles an interrupt as early as possible."""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import NoReturn


def run(arguments: Sequence[str] | None = None) -> int:
    """Runs the command in `arguments`; returns the exit code."""
    try:
        from ._volar import invoke

        return invoke(arguments)
    except KeyboardInterrupt:
        return 130


def main() -> NoReturn:
    """Runs the command `volar`."""
    from ._streams import BROKEN_PIPE, OutputError, discard_output, prepare

    # While modules are imported, collections find nothing, and take a quarter of the time. `guarded` turns them on.
    gc.disable()
    prepare()
    try:
        code = run()
        sys.stdout.flush()
    except OutputError as error:
        # Commands handle errors of their own output; this is for the help and other output of Click.
        code = BROKEN_PIPE if error.broken_pipe else 1
        if not error.broken_pipe:
            sys.stderr.write(f"volar: {error}\n")
        discard_output()
    # A last collection would go through all that was imported.
    gc.freeze()
    sys.exit(code)


if __name__ == "__main__":
    main()
