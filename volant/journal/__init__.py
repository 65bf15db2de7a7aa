"""The journal: what must not be lost, events in order, and what VMs have said."""

from ._answers import Answer, Answers, Kept, Once, Refusal
from ._errors import AlreadyAnswered, DatabaseRefused, JournalBroken, StaleRow
from ._events import EventCursor, EventGap, EventLog, EventLogStatistics
from ._frames import EventFrame
from ._journal import Journal
from ._projection import Plugin, Projection
from ._store import Retention, Store
from ._vmlog import LogCursor, LogEntry, LogGap, LogStatistics, LogStream, VmLog
from ._vmlogs import VmLogs
from .messages import CommitSteps, CreateRow, EnablePlugin, InstallPlugin, KeepRefusal, RemovePlugin, StillThere

__all__ = [
    "AlreadyAnswered",
    "Answer",
    "Answers",
    "CommitSteps",
    "CreateRow",
    "DatabaseRefused",
    "EnablePlugin",
    "EventCursor",
    "EventFrame",
    "EventGap",
    "EventLog",
    "EventLogStatistics",
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
    "RemovePlugin",
    "Retention",
    "StaleRow",
    "StillThere",
    "Store",
    "VmLog",
    "VmLogs",
]
