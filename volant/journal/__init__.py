"""The journal: durable state, events in order, and the logs of VMs."""

from ._backups import MAX_UPLOAD_BYTES, Backup, Backups, Upload
from ._client import ask_journal, journal_down
from ._copies import replaced_databases
from ._errors import DatabaseRefused, DuplicateRequest, JournalBroken, StaleRow
from ._events import EventCursor, EventGap, EventLog, EventLogStatistics
from ._frames import EventFrame
from ._journal import Journal
from ._log_cursor import LogCursor, LogGap
from ._merge import Evidence, Running
from ._projection import Plugin, Projection, plugin_view
from ._responses import IdempotencyKey, StoredResponse, StoredResponses
from ._restore import restore_offline, take_over
from ._results import (
    NetworkCreated,
    PluginChanged,
    PluginInstalled,
    Refusal,
    Result,
    SnapshotTaken,
    VmChanged,
    VmCreated,
    VmForked,
)
from ._store import Retention, Store
from ._vmlog import MAX_LINE_BYTES, LogEntry, LogStatistics, LogStream, VmLog
from ._vmlogs import VmLogs
from .messages import (
    AddNetwork,
    AdoptRow,
    BeginSnapshot,
    CommitSteps,
    CreateRow,
    EnablePlugin,
    EndDrain,
    FinishSnapshot,
    ForkRow,
    InstallPlugin,
    RemoveNetwork,
    RemovePlugin,
    RemoveSnapshot,
    RestoreRow,
    SetDrain,
    StillThere,
    StoreRefusal,
)

__all__ = [
    "MAX_LINE_BYTES",
    "MAX_UPLOAD_BYTES",
    "AddNetwork",
    "AdoptRow",
    "Backup",
    "Backups",
    "BeginSnapshot",
    "CommitSteps",
    "CreateRow",
    "DatabaseRefused",
    "DuplicateRequest",
    "EnablePlugin",
    "EndDrain",
    "EventCursor",
    "EventFrame",
    "EventGap",
    "EventLog",
    "EventLogStatistics",
    "Evidence",
    "FinishSnapshot",
    "ForkRow",
    "IdempotencyKey",
    "InstallPlugin",
    "Journal",
    "JournalBroken",
    "LogCursor",
    "LogEntry",
    "LogGap",
    "LogStatistics",
    "LogStream",
    "NetworkCreated",
    "Plugin",
    "PluginChanged",
    "PluginInstalled",
    "Projection",
    "Refusal",
    "RemoveNetwork",
    "RemovePlugin",
    "RemoveSnapshot",
    "RestoreRow",
    "Result",
    "Retention",
    "Running",
    "SetDrain",
    "SnapshotTaken",
    "StaleRow",
    "StillThere",
    "Store",
    "StoreRefusal",
    "StoredResponse",
    "StoredResponses",
    "Upload",
    "VmChanged",
    "VmCreated",
    "VmForked",
    "VmLog",
    "VmLogs",
    "ask_journal",
    "journal_down",
    "plugin_view",
    "replaced_databases",
    "restore_offline",
    "take_over",
]
