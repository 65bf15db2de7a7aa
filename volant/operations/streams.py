"""Events and logs: what adapters stream by hand."""

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
    """Returns the parameter by which a stream has only events of some types."""
    names: Any = tuple(str(kind) for kind in kinds)
    return Parameter(
        "types", Annotated[GenericAlias(list, Literal[names]), msgspec.Meta(min_length=1)], "Of these types"
    )


_SEQ = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]
_LABEL = Parameter(
    "label", Annotated[str, msgspec.Meta(pattern="^[^=]+=")], "`key=value`; all of them must hold", repeated=True
)

TABLE.declare(
    "GET /api/v1/events/vms",
    "vm_events",
    Permission.VIEW,
    "Follow what happens to VMs",
    answers={200: Answer("Server-sent events", str, "text/event-stream", items=(Event, StreamGap))},
    documented=(
        Parameter("since", str, "After this event; `0` for the oldest kept"),
        Parameter("last_event_id", str, "After this event; wins over `since`"),
        Parameter("Last-Event-ID", str, "After this event; wins over both", place="header"),
        Parameter("vm", Name, "Of this VM"),
        _types(VM_EVENTS),
        _LABEL,
        Parameter("on_gap", Literal["410"], "410 instead of a `STREAM_GAP` when events are not kept"),
    ),
    errors=(410,),
    credentials_in_query=True,
)

TABLE.declare(
    "GET /api/v1/events/images",
    "image_events",
    Permission.VIEW,
    "Follow what happens to OCI images",
    answers={200: Answer("Server-sent events", str, "text/event-stream", items=(Event, StreamGap))},
    documented=(
        Parameter("since", str, "After this event; `0` for the oldest kept"),
        Parameter("last_event_id", str, "After this event; wins over `since`"),
        Parameter("Last-Event-ID", str, "After this event; wins over both", place="header"),
        _types(IMAGE_EVENTS),
        Parameter("on_gap", Literal["410"], "410 instead of a `STREAM_GAP` when events are not kept"),
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
            "The oldest first", list[AuditRecord], headers=("Link",), items=(AuditGap,), streams=True, lines=True
        )
    },
    documented=(
        Parameter("caller", str, "By this caller: its name or its id"),
        Parameter("operation", str, "Calls of this operation"),
        Parameter("target", str, "About the object with this name"),
        Parameter("request_id", str, "Of this request"),
        Parameter("since", Time, "From this time on, to the second"),
        Parameter("until", Time, "Before this time, to the second"),
        Parameter("cursor", _SEQ, "After the record with this `seq`; as in the `Link` before"),
        Parameter("tail", Annotated[int, msgspec.Meta(ge=0, le=1000)], "The newest N records, instead of `cursor`"),
        Parameter("limit", Annotated[int, msgspec.Meta(ge=1, le=1000)], "Maximum records in a page; default 1000"),
        Parameter("follow", bool, "With `application/x-ndjson`: whether to continue with new records"),
        Parameter("Last-Event-ID", str, "Of a stream: after this record; wins over `cursor`", place="header"),
    ),
    errors=(503,),
    credentials_in_query=True,
    details="With `Accept: application/x-ndjson` all that fit, one object a line; with `text/event-stream` as events "
    "of the type `AUDIT`, and then new ones as they are written. A stream has an `AuditGap` in place of records that "
    "are not kept. `?project=` names a project; without it those of all projects come.",
)

_LOG_PARAMETERS = (
    Parameter("tail", Annotated[int, msgspec.Meta(ge=0, le=1_000_000)], "The last so many lines of the chosen streams"),
    Parameter(
        "since",
        Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)] | Time,
        "After this `seq`, or from this time on; wins over `tail`",
    ),
    Parameter("follow", bool, "Whether to continue with new lines"),
    Parameter(
        "stream", Annotated[list[Literal["stdout", "stderr", "console"]], msgspec.Meta(min_length=1)], "Default: all"
    ),
    Parameter(
        "vm_id",
        Annotated[int, msgspec.Meta(ge=1, le=MAX_INTEGER)],
        "Of a VM of that name, deleted within the last 24 h",
    ),
)

TABLE.declare(
    "GET /api/v1/vms/{name}/logs",
    "vm_logs",
    Permission.USE,
    "Read the log of a VM: its console and its workload",
    answers={200: Answer("One JSON object a line", str, "application/x-ndjson", items=(LogLine, LogGap))},
    documented=_LOG_PARAMETERS,
    errors=(503,),
    details="By default everything that is kept, without following.",
    only_reads=True,
)
TABLE.declare(
    "GET /ws/v1/vms/{name}/logs",
    "vm_logs_websocket",
    Permission.USE,
    "The same as a WebSocket",
    answers={101: Answer("One JSON object a text message", items=(LogLine, LogGap))},
    documented=_LOG_PARAMETERS,
    errors=(426, 503),
    credentials_in_query=True,
    details="By default the last 100 lines, and following. Closes with 1000 when the VM is deleted or the wanted part "
    "is through, with 1001 when the daemon stops.",
    only_reads=True,
)
