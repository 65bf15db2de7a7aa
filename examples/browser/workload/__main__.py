"""`python3 -m browser`, as root: starts Chromium as the user `browser`, and serves the actions."""

from __future__ import annotations

import os
import pwd
import signal
import sys
from pathlib import Path

USER = "browser"


def main() -> int:
    """Run until SIGTERM."""
    if os.geteuid() == 0:
        entry = pwd.getpwnam(USER)
        os.initgroups(USER, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
        os.environ["HOME"] = entry.pw_dir
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    from ._chromium import Chromium

    chromium = Chromium(Path.home())
    # First of all, as it takes longest; meanwhile the server is imported.
    chromium.start()
    from ._server import Server

    Server(chromium).start()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    chromium.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
