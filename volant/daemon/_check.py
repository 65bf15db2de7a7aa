"""`volantd check`: reports on the host as JSON. `volar setup --check` shows the report to people."""

from __future__ import annotations

import msgspec
import trio

from volant.host import Host

from ._doctor import examine
from ._settings import Settings


def check(settings: Settings) -> tuple[str, int]:
    """Returns the report and the exit code: 0 if VMs can run here, else 1."""
    report = trio.run(examine, settings, Host())
    return msgspec.json.format(msgspec.json.encode(report)).decode(), 1 if report.failed else 0
