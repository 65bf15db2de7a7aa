"""The typed client of the daemon's HTTP API, for programs on Trio; `volar` is built on it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from volant import lazy_exports
from volant.model import (
    AuditGap,
    AuditRecord,
    ConsoleGap,
    Health,
    LogGap,
    LogLine,
    PluginView,
    StreamGap,
    SystemStatus,
    Ticket,
)

from ._address import Address
from ._browser import Browser, BrowserPage
from ._errors import (
    ClientError,
    ClientProblem,
    Command,
    ConnectionLost,
    DeadlineExceeded,
    Reconnected,
    UnexpectedAnswer,
    Unreachable,
    Waited,
)
from ._exec import ExecEnd, ExecOutput, Process, RemoteSession
from ._operations import (
    AuthOperations,
    FleetOperations,
    ForksOperations,
    HostsOperations,
    ImagesOperations,
    KeysOperations,
    NetworksOperations,
    PluginsOperations,
    ProjectsOperations,
    SecretsOperations,
    SnapshotsOperations,
    SystemOperations,
    TemplatesOperations,
    VmsOperations,
    VolumesOperations,
)
from ._tls import Tls

if TYPE_CHECKING:
    from ._actions import ActionAnswer
    from ._backups import Backup
    from ._client import Client
    from ._console import Console
    from ._exec_session import ExecGap, ExecSession
    from ._feed import Feed, OnRetry
    from ._files import FileInfo, FileReader
    from ._tcp import TcpStream
else:
    # Trio and httpx take longer to import than most commands of `volar` to run, and most need neither.
    _MODULES = {
        "ActionAnswer": "_actions",
        "Backup": "_backups",
        "Client": "_client",
        "Console": "_console",
        "ExecGap": "_exec_session",
        "ExecSession": "_exec_session",
        "Feed": "_feed",
        "FileInfo": "_files",
        "FileReader": "_files",
        "OnRetry": "_feed",
        "TcpStream": "_tcp",
    }

    __getattr__ = lazy_exports(__name__, _MODULES)

    def __dir__() -> list[str]:
        return [*globals(), *_MODULES]


__all__ = [
    "ActionAnswer",
    "Address",
    "AuditGap",
    "AuditRecord",
    "AuthOperations",
    "Backup",
    "Browser",
    "BrowserPage",
    "Client",
    "ClientError",
    "ClientProblem",
    "Command",
    "ConnectionLost",
    "Console",
    "ConsoleGap",
    "DeadlineExceeded",
    "ExecEnd",
    "ExecGap",
    "ExecOutput",
    "ExecSession",
    "Feed",
    "FileInfo",
    "FileReader",
    "FleetOperations",
    "ForksOperations",
    "Health",
    "HostsOperations",
    "ImagesOperations",
    "KeysOperations",
    "LogGap",
    "LogLine",
    "NetworksOperations",
    "OnRetry",
    "PluginView",
    "PluginsOperations",
    "Process",
    "ProjectsOperations",
    "Reconnected",
    "RemoteSession",
    "SecretsOperations",
    "SnapshotsOperations",
    "StreamGap",
    "SystemOperations",
    "SystemStatus",
    "TcpStream",
    "TemplatesOperations",
    "Ticket",
    "Tls",
    "UnexpectedAnswer",
    "Unreachable",
    "VmsOperations",
    "VolumesOperations",
    "Waited",
]
