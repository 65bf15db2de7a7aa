"""`python -m volant.daemon.guests`: shuts down the guests of a stopped daemon; see `_guests.py`."""

from __future__ import annotations

import logging
import os
import sys

import trio

from volant.host import Host
from volant.hypervisor.qemu import QemuHypervisor

from ._command_line import load
from ._directories import DirectoryError, claimed, confine
from ._guests import stop_guests
from ._journald import JournalHandler, is_journal
from ._settings import SettingsError, parse_uids


def main() -> None:
    """Exits with 0 when no guest is left, 1 when one is left or the daemon runs, 2 for invalid settings."""
    handlers = [JournalHandler("volant-guests")] if is_journal(sys.stderr.fileno(), os.environ) else None
    logging.basicConfig(level="INFO", format="%(levelname)-7s %(message)s", handlers=handlers)
    try:
        settings, _ = load(sys.argv[1:], os.environ)
        with claimed(settings):
            host = Host(users=parse_uids(settings.vm_uids))
            confine(host, settings)
            left = trio.run(stop_guests, settings, host, QemuHypervisor(host, settings.cache_dir))
    except SettingsError as error:
        logging.error("%s", error)
        sys.exit(2)
    except DirectoryError as error:
        logging.error("%s; `volar system drain --stop-vms` stops guests while the daemon runs", error)
        sys.exit(1)
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
