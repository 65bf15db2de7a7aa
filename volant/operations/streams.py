"""Events and logs, which adapters stream."""

from __future__ import annotations

from types import GenericAlias
from typing import Annotated, Any, Literal

import msgspec

from volant.http import MAX_INTEGER
from volant.model import (
    IMAGE_EVENTS,
    VM_EVENTS,
    AuditGap,
    AuditRecord,
    Event,
    EventType,
    LogGap,
    LogLine,
    Name,
    Permission,
    StreamGap,
    Time,
)

from ._parameters import Parameter
from ._table import TABLE, Answer


def _types(kinds: tuple[EventType, ...]) -> Parameter:
    """Returns the parameter that limits a stream to some types of events."""
    names: Any = tuple(str(kind) for kind in kinds)
    return Parameter(
        "types", Annotated[GenericAlias(list, Literal[names]), msgspec.Meta(min_length=1)], "Only events of these types"
    )


_SEQ = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]
_LABEL = Parameter(
    "label",
    Annotated[str, msgspec.Meta(pattern="^[^=]+=")],
    "Only VMs with all of these labels, as `key=value`",
    repeated=True,
)

TABLE.declare(
    "GET /api/v1/events/vms",
    "vm_events",
    Permission.VIEW,
    "Follow the events of VMs",
    answers={200: Answer("Server-sent events", str, "text/event-stream", items=(Event, StreamGap))},
    documented=(
        Parameter("since", str, "Start after this event; `0` for the oldest one"),
        Parameter("last_event_id", str, "Start after this event; overrides `since`"),
        Parameter("Last-Event-ID", str, "Start after this event; overrides both", place="header"),
        Parameter("vm", Name, "Only events of this VM"),
        _types(VM_EVENTS),
        _LABEL,
        Parameter("on_gap", Literal["410"], "Fail with 410 instead of a `STREAM_GAP` if events have expired"),
    ),
    errors=(410,),
    credentials_in_query=True,
)

TABLE.declare(
    "GET /api/v1/events/images",
    "image_events",
    Permission.VIEW,
    "Follow the events of OCI images",
    answers={200: Answer("Server-sent events", str, "text/event-stream", items=(Event, StreamGap))},
    documented=(
        Parameter("since", str, "Start after this event; `0` for the oldest one"),
        Parameter("last_event_id", str, "Start after this event; overrides `since`"),
        Parameter("Last-Event-ID", str, "Start after this event; overrides both", place="header"),
        _types(IMAGE_EVENTS),
        Parameter("on_gap", Literal["410"], "Fail with 410 instead of a `STREAM_GAP` if events have expired"),
    ),
    errors=(410,),
    credentials_in_query=True,
)

TABLE.declare(
    "GET /api/v1/audit",
    "audit",
    Permission.ADMIN,
    "Read the audit log",
    answers={
        200: Answer(
            "The records, oldest first",
            list[AuditRecord],
            headers=("Link",),
            items=(AuditGap,),
            streams=True,
            lines=True,
        )
    },
    documented=(
        Parameter("caller", str, "Only records of this caller: its name or id"),
        Parameter("operation", str, "Only records of this operation"),
        Parameter("target", str, "Only records about the object with this name"),
        Parameter("request_id", str, "Only records of this request"),
        Parameter("since", Time, "Only records from this time on, exact to a second"),
        Parameter("until", Time, "Only records before this time, exact to a second"),
        Parameter("cursor", _SEQ, "Only records after this `seq`; from the previous `Link` header"),
        Parameter("tail", Annotated[int, msgspec.Meta(ge=0, le=1000)], "Only the newest N records; excludes `cursor`"),
        Parameter("limit", Annotated[int, msgspec.Meta(ge=1, le=1000)], "Maximum records per page; default 1000"),
        Parameter("follow", bool, "With `application/x-ndjson`: whether to continue with new records"),
        Parameter("Last-Event-ID", str, "For a stream: start after this record; overrides `cursor`", place="header"),
    ),
    errors=(503,),
    credentials_in_query=True,
    details="`Accept: application/x-ndjson` returns all matching records, one object per line; `text/event-stream` "
    "returns them as events of the type `AUDIT`, followed by new ones as they are written. A stream has an `AuditGap` "
    "in place of expired records. `?project=` selects one project; the default is all projects.",
)

_LOG_PARAMETERS = (
    Parameter("tail", Annotated[int, msgspec.Meta(ge=0, le=1_000_000)], "Only the last N lines of the chosen streams"),
    Parameter(
        "since",
        Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)] | Time,
        "Only lines after this `seq`, or from this time on; overrides `tail`",
    ),
    Parameter("follow", bool, "Whether to continue with new lines"),
    Parameter(
        "stream",
        Annotated[list[Literal["stdout", "stderr", "console"]], msgspec.Meta(min_length=1)],
        "Only lines of these streams; default: all",
    ),
    Parameter(
        "vm_id",
        Annotated[int, msgspec.Meta(ge=1, le=MAX_INTEGER)],
        "The id of a VM with this name that was deleted within the last 24 h",
    ),
)

TABLE.declare(
    "GET /api/v1/vms/{name}/logs",
    "vm_logs",
    Permission.USE,
    "Read the log of a VM's console and workload",
    answers={200: Answer("One JSON object per line", str, "application/x-ndjson", items=(LogLine, LogGap))},
    documented=_LOG_PARAMETERS,
    errors=(503,),
    details="By default all stored lines, without following.",
    only_reads=True,
)
TABLE.declare(
    "GET /ws/v1/vms/{name}/logs",
    "vm_logs_websocket",
    Permission.USE,
    "Read the log of a VM (WebSocket)",
    answers={101: Answer("One JSON object per text message", items=(LogLine, LogGap))},
    documented=_LOG_PARAMETERS,
    errors=(426, 503),
    credentials_in_query=True,
    details="By default the last 100 lines, with following. Close codes: 1000 when the VM is deleted or the requested "
    "lines are complete, 1001 when the daemon stops.",
    only_reads=True,
)
