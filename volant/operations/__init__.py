"""The operations that clients can call, each declared once, and helpers for the adapters that offer them.

`TABLE` holds all of them. Importing this package fills it, except for the additions of `agui/` and `mcp/`.
"""

from ._admission import Admission as Admission, acting as acting, begin as begin, name_target as name_target
from ._context import Context as Context
from ._deps import ApiDeps as ApiDeps, DaemonInfo as DaemonInfo, Health as Health
from ._images import (
    REGISTRY_AUTH as REGISTRY_AUTH,
    admit_image as admit_image,
    image_problem as image_problem,
    image_problems as image_problems,
    image_view as image_view,
    registry_auth as registry_auth,
)
from ._lookup import (
    Waited as Waited,
    enter as enter,
    find_action as find_action,
    find_vm as find_vm,
    open_log as open_log,
    record_access as record_access,
    require_project as require_project,
    select_vms as select_vms,
    unreadable as unreadable,
    wait_for as wait_for,
)
from ._parameters import (
    TEN_MINUTES as TEN_MINUTES,
    Parameter as Parameter,
    QueryParameter as QueryParameter,
)
from ._results import Page as Page, Shown as Shown, etag as etag, show as show, view_type as view_type
from ._schema import Schema as Schema, describe as describe, owners as owners, standalone as standalone
from ._table import (
    ANY as ANY,
    DEFAULT_WAIT_S as DEFAULT_WAIT_S,
    OCTETS as OCTETS,
    SQLITE as SQLITE,
    TABLE as TABLE,
    TIMEOUT as TIMEOUT,
    WAIT as WAIT,
    Answer as Answer,
    JsonObject as JsonObject,
    OneOf as OneOf,
    Operation as Operation,
    Recorded as Recorded,
    Table as Table,
    Tool as Tool,
)

# In the order in which documents show them.
from . import vms, snapshots, forks, streams, guests, plugins, networks, images  # isort: skip  # noqa: F401
from . import volumes, secrets, templates, projects, keys, hosts, system  # isort: skip  # noqa: F401
