"""Events and logs: what adapters stream by hand."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from volant.http import MAX_INTEGER
from volant.model import Event, EventType, LogGap, LogLine, Name, StreamGap, Time

from ._parameters import Described
from ._permission import Permission
from ._table import TABLE, Answer

_LABEL = Described(
    "label", Annotated[str, msgspec.Meta(pattern="^[^=]+=")], "`key=value`; all of them must hold", repeated=True
)

TABLE.declare(
    "GET /api/v1/events/vms",
    "vm_events",
    Permission.VIEW,
    "Follow what happens to VMs",
    answers={200: Answer("Server-sent events", str, "text/event-stream", items=(Event, StreamGap))},
    described=(
        Described("since", str, "After this event; `0` for the oldest kept"),
        Described("last_event_id", str, "After this event; wins over `since`"),
        Described("Last-Event-ID", str, "After this event; wins over both", place="header"),
        Described("vm", Name, "Of this VM"),
        Described("types", Annotated[list[EventType], msgspec.Meta(min_length=1)], "Of these types"),
        _LABEL,
        Described("on_gap", Literal["410"], "410 instead of a `STREAM_GAP` when events are not kept"),
    ),
    errors=(410,),
    credentials_in_query=True,
)

_LOG_PARAMETERS = (
    Described("tail", Annotated[int, msgspec.Meta(ge=0, le=1_000_000)], "The last so many lines of the chosen streams"),
    Described(
        "since",
        Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)] | Time,
        "After this `seq`, or from this time on; wins over `tail`",
    ),
    Described("follow", bool, "Whether to continue with new lines"),
    Described(
        "stream", Annotated[list[Literal["stdout", "stderr", "console"]], msgspec.Meta(min_length=1)], "Default: all"
    ),
    Described(
        "vm_id",
        Annotated[int, msgspec.Meta(ge=1, le=MAX_INTEGER)],
        "Of a VM of that name, deleted within the last 24 h",
    ),
)

TABLE.declare(
    "GET /api/v1/vms/{name}/logs",
    "vm_logs",
    Permission.VIEW,
    "Read the log of a VM: its console and its workload",
    answers={200: Answer("One JSON object a line", str, "application/x-ndjson", items=(LogLine, LogGap))},
    described=_LOG_PARAMETERS,
    errors=(503,),
    details="By default everything that is kept, without following.",
)
TABLE.declare(
    "GET /ws/v1/vms/{name}/logs",
    "vm_logs_websocket",
    Permission.VIEW,
    "The same as a WebSocket",
    answers={101: Answer("One JSON object a text message", items=(LogLine, LogGap))},
    described=_LOG_PARAMETERS,
    errors=(426, 503),
    credentials_in_query=True,
    details="By default the last 100 lines, and following. Closes with 1000 when the VM is deleted or the wanted part "
    "is through, with 1001 when the daemon stops.",
)
