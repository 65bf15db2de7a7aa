"""What clients can do: each operation once, and what adapters need to offer it.

`TABLE` holds all of them. Importing this package fills it, but for what `agui/` and `mcp/` add of their own.
"""

from ._artifacts import artifact_problems
from ._authorize import check_operation, check_permission
from ._context import Context
from ._deps import ApiDeps, DaemonInfo, Health
from ._lookup import find_action, find_vm, open_log, select_vms, unreadable
from ._parameters import TEN_MINUTES, Described, QueryParameter
from ._permission import Permission
from ._results import Page, Shown, etag, show, view_type
from ._schema import Schema, describe, owners, standalone
from ._table import (
    ANY,
    DEFAULT_WAIT_S,
    OCTETS,
    SQLITE,
    TABLE,
    TIMEOUT,
    WAIT,
    Answer,
    Anything,
    OneOf,
    Operation,
    Table,
    Tool,
)
from ._waiting import Waited, wait_for

# In the order in which documents show them.
from . import vms, snapshots, streams, guests, plugins, networks, templates, system  # isort: skip  # noqa: F401

from .networks import shown_networks

__all__ = [
    "ANY",
    "DEFAULT_WAIT_S",
    "OCTETS",
    "SQLITE",
    "TABLE",
    "TEN_MINUTES",
    "TIMEOUT",
    "WAIT",
    "Answer",
    "Anything",
    "ApiDeps",
    "Context",
    "DaemonInfo",
    "Described",
    "Health",
    "OneOf",
    "Operation",
    "Page",
    "Permission",
    "QueryParameter",
    "Schema",
    "Shown",
    "Table",
    "Tool",
    "Waited",
    "artifact_problems",
    "check_operation",
    "check_permission",
    "describe",
    "etag",
    "find_action",
    "find_vm",
    "open_log",
    "owners",
    "select_vms",
    "show",
    "shown_networks",
    "standalone",
    "unreadable",
    "view_type",
    "wait_for",
]
