"""The entry point of `volantd`, which imports the daemon."""

from __future__ import annotations

import gc


def main() -> None:
    """Runs the daemon or a sub-command. Exits with 0 after a signal, 1 if it can't run, 2 for invalid settings."""
    # While modules are imported, collections find nothing and take a tenth of the start. Later ones may leave out what
    # was imported, as it stays.
    gc.disable()
    from ._program import run

    gc.freeze()
    gc.enable()
    run()


if __name__ == "__main__":
    main()
