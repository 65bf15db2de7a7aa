"""The entry point of `volantd`."""

from __future__ import annotations

import logging
import os
import resource
import sys
from functools import partial

import trio

from ._daemon import DaemonError, run
from ._settings import SettingsError, load


def main() -> None:
    """Run the daemon until a signal ends it; exit code 0 then, 1 when it can't run, 2 for settings that don't fit."""
    try:
        environ = dict(os.environ)
        # No process that we start may inherit it.
        os.environ.pop("VOLANT_API_KEY", None)
        again = partial(load, sys.argv[1:], environ)
        settings, warnings = again()
    except SettingsError as error:
        sys.exit(_complain(str(error), 2))
    logging.basicConfig(
        level=settings.log_level.upper(),
        format="%(asctime)s %(levelname)-7s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    # It logs every header at this level.
    logging.getLogger("hpack").setLevel(logging.WARNING)
    for warning in warnings:
        logging.getLogger("volant.daemon").warning("%s", warning)
    # A VM has some twenty descriptors, and each client one; the soft limit is made for programs that use select().
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        trio.run(run, settings, again)
    except (DaemonError, SettingsError) as error:
        sys.exit(_complain(str(error), 1))
    except KeyboardInterrupt:
        sys.exit(130)


def _complain(text: str, code: int) -> int:
    print(f"volantd: {text}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    main()
