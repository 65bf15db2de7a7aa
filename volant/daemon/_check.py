"""`volantd check`: a report of the host, as JSON. For people `volar setup --check` lays it out."""

from __future__ import annotations

import msgspec
import trio

from volant.host import Host

from ._doctor import examine
from ._settings import Settings


def check(settings: Settings) -> tuple[str, int]:
    """The report, and the exit code: 0 when VMs can run here, else 1."""
    report = trio.run(examine, settings, Host())
    return msgspec.json.format(msgspec.json.encode(report)).decode(), 1 if report.failed else 0
