"""Supervised actors on Trio: OTP's supervision trees, bounded mailboxes, typed requests, and one log for many readers.

**Once a child has started, cancelling a scope around the tree does not reach it.** Its supervisor stops it when its
turn comes: children stop one after the other, the last one first, each within its own `shutdown_s`. The block of
`open_system` ends when the last of them has. Everything else follows Trio's rules: until it has started, a child is as
cancellable as any task, and so are the block itself and each `ask`.
"""

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
from ._tap import Tap, TapEvent, TapKind, fault
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
