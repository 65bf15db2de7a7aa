"""What clients can do: each operation once, and what adapters need to offer it.

`TABLE` holds all of them. Importing this package fills it, but for what `agui/` and `mcp/` add of their own.
"""

from ._admission import Admission, acting, begin, name_target
from ._artifacts import artifact_problems
from ._context import Context
from ._deps import ApiDeps, DaemonInfo, Health
from ._images import REGISTRY_AUTH, admit_image, image_problem, image_problems, image_view, registry_auth
from ._lookup import (
    Waited,
    enter,
    find_action,
    find_vm,
    open_log,
    record_access,
    require_project,
    select_vms,
    unreadable,
    wait_for,
)
from ._parameters import TEN_MINUTES, Described, QueryParameter
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
    Recorded,
    Table,
    Tool,
)

# In the order in which documents show them.
from . import vms, snapshots, forks, streams, guests, plugins, networks, images  # isort: skip  # noqa: F401
from . import volumes, secrets, templates, projects, keys, hosts, system  # isort: skip  # noqa: F401

from .networks import shown_networks

__all__ = [
    "ANY",
    "DEFAULT_WAIT_S",
    "OCTETS",
    "REGISTRY_AUTH",
    "SQLITE",
    "TABLE",
    "TEN_MINUTES",
    "TIMEOUT",
    "WAIT",
    "Admission",
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
    "QueryParameter",
    "Recorded",
    "Schema",
    "Shown",
    "Table",
    "Tool",
    "Waited",
    "acting",
    "admit_image",
    "artifact_problems",
    "begin",
    "describe",
    "enter",
    "etag",
    "find_action",
    "find_vm",
    "image_problem",
    "image_problems",
    "image_view",
    "name_target",
    "open_log",
    "owners",
    "record_access",
    "registry_auth",
    "require_project",
    "select_vms",
    "show",
    "shown_networks",
    "standalone",
    "unreadable",
    "view_type",
    "wait_for",
]
