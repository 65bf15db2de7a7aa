"""The tools that models can call.

Most tools are derived from the operations. The tools here do more than one REST request: they read or write a whole
stream, shorten long results, or filter.
"""

from __future__ import annotations

import re

from volant.operations import Table

from ._derived import derived_tools
from ._guest_tools import call_action, execute, read_file, write_file
from ._history import read_logs, see_events
from ._plugins import list_plugins
from ._tool import Tool

RESOURCE = re.compile(r"volant://vms/([^/]+)(?:/(logs|files)(/.*)?)?\Z", re.DOTALL)
READ_BY = {"": "get_vm", "logs": "vm_logs", "files": "read_file"}
"""The operation that reads each kind of resource, and whose permission is required."""


def tools(table: Table) -> tuple[Tool, ...]:
    """Returns the tools of a table, in the order in which they are shown."""
    return (*derived_tools(table), *_BY_HAND)


_BY_HAND = (
    execute,
    read_file,
    write_file,
    call_action,
    read_logs,
    see_events,
    list_plugins,
)
