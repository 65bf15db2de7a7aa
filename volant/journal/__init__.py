"""The journal: what must not be lost, events in order, and what VMs have said."""

from ._answers import Answer, Answers, Kept, Once, Refusal
from ._backups import MAX_UPLOAD_BYTES, Backup, Backups, Upload
from ._client import ask_journal, journal_down
from ._errors import AlreadyAnswered, DatabaseRefused, JournalBroken, StaleRow
from ._events import EventCursor, EventGap, EventLog, EventLogStatistics
from ._frames import EventFrame
from ._journal import Journal
from ._projection import Plugin, Projection
from ._restore import Evidence, Running, replaced_databases, restore_offline, take_over
from ._store import Retention, Store
from ._vmlog import LogCursor, LogEntry, LogGap, LogStatistics, LogStream, VmLog
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
    KeepRefusal,
    RemoveNetwork,
    RemovePlugin,
    RemoveSnapshot,
    RestoreRow,
    SetDrain,
    StillThere,
)

__all__ = [
    "MAX_UPLOAD_BYTES",
    "AddNetwork",
    "AdoptRow",
    "AlreadyAnswered",
    "Answer",
    "Answers",
    "Backup",
    "Backups",
    "BeginSnapshot",
    "CommitSteps",
    "CreateRow",
    "DatabaseRefused",
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
    "InstallPlugin",
    "Journal",
    "JournalBroken",
    "KeepRefusal",
    "Kept",
    "LogCursor",
    "LogEntry",
    "LogGap",
    "LogStatistics",
    "LogStream",
    "Once",
    "Plugin",
    "Projection",
    "Refusal",
    "RemoveNetwork",
    "RemovePlugin",
    "RemoveSnapshot",
    "RestoreRow",
    "Retention",
    "Running",
    "SetDrain",
    "StaleRow",
    "StillThere",
    "Store",
    "Upload",
    "VmLog",
    "VmLogs",
    "ask_journal",
    "journal_down",
    "replaced_databases",
    "restore_offline",
    "take_over",
]
