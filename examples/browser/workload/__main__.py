"""`python3 -m browser`, as root: starts Chromium as the user `browser`, and serves the actions."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import sys
from pathlib import Path

from ._catalogue import PORT

USER = "browser"
BACKLOG = 32


def main() -> int:
    """Runs until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    if os.geteuid() == 0:
        entry = pwd.getpwnam(USER)
        os.initgroups(USER, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
        os.environ["HOME"] = entry.pw_dir
    from ._chromium import Chromium

    # Listen first: clients that connect while Chromium starts wait instead of being refused.
    chromium = Chromium(Path.home())
    chromium.start()
    listener = socket.create_server(("127.0.0.1", PORT), backlog=BACKLOG)
    from ._server import Server

    Server(chromium, listener).start()
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    chromium.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
