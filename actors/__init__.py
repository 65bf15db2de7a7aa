"""Supervised actors on Trio: OTP's supervision, bounded mailboxes, typed requests, and one way to fan out."""

from ._actor import Actor, Context, TaskHandle
from ._cell import PERMANENT, TEMPORARY, TRANSIENT, Child, Restart, Started
from ._errors import (
    ActorDown,
    ActorError,
    AskTimeout,
    Fenced,
    MailboxFull,
    NameTaken,
    NoSuchChild,
    SelfAsk,
    StartFailed,
    StartTimeout,
    TooManyRestarts,
    Unhandled,
)
from ._exit import Exit, ExitKind
from ._fault import fault
from ._fence import check_fence
from ._log import Cursor, Gap, Log, LogStatistics
from ._mailbox import Deferred
from ._message import Down, Request, handles
from ._ref import Ref
from ._supervisor import (
    ONE_FOR_ALL,
    ONE_FOR_ONE,
    REST_FOR_ONE,
    Backoff,
    DynamicSupervisor,
    GaveUp,
    Strategy,
    Supervisor,
)
from ._system import System, open_system
from ._tap import Tap, TapEvent, TapKind
from ._timer import Timer

__version__ = "0.1.0"

__all__ = [
    "ONE_FOR_ALL",
    "ONE_FOR_ONE",
    "PERMANENT",
    "REST_FOR_ONE",
    "TEMPORARY",
    "TRANSIENT",
    "Actor",
    "ActorDown",
    "ActorError",
    "AskTimeout",
    "Backoff",
    "Child",
    "Context",
    "Cursor",
    "Deferred",
    "Down",
    "DynamicSupervisor",
    "Exit",
    "ExitKind",
    "Fenced",
    "Gap",
    "GaveUp",
    "Log",
    "LogStatistics",
    "MailboxFull",
    "NameTaken",
    "NoSuchChild",
    "Ref",
    "Request",
    "Restart",
    "SelfAsk",
    "StartFailed",
    "StartTimeout",
    "Started",
    "Strategy",
    "Supervisor",
    "System",
    "Tap",
    "TapEvent",
    "TapKind",
    "TaskHandle",
    "Timer",
    "TooManyRestarts",
    "Unhandled",
    "check_fence",
    "fault",
    "handles",
    "open_system",
]
