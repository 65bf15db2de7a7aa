"""The typed client of the daemon's HTTP API, for programs on Trio; `volar` is built on it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from volant.model import ConsoleGap, Health, LogGap, LogLine, PluginView, Restored, StreamGap, SystemStatus, Ticket

from ._address import Address
from ._browser import Browser, BrowserPage
from ._errors import ClientError, ClientProblem, ConnectionLost, DeadlineExceeded, UnexpectedAnswer, Unreachable
from ._exec import ExecEnd, ExecOutput, Process, RemoteSession
from ._operations import (
    NetworksOperations,
    PluginsOperations,
    SnapshotsOperations,
    SystemOperations,
    TemplatesOperations,
    VmsOperations,
)
from ._types import Command, Reconnected, Waited

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

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return [*globals(), *_MODULES]


__all__ = [
    "ActionAnswer",
    "Address",
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
    "Health",
    "LogGap",
    "LogLine",
    "NetworksOperations",
    "OnRetry",
    "PluginView",
    "PluginsOperations",
    "Process",
    "Reconnected",
    "RemoteSession",
    "Restored",
    "SnapshotsOperations",
    "StreamGap",
    "SystemOperations",
    "SystemStatus",
    "TcpStream",
    "TemplatesOperations",
    "Ticket",
    "UnexpectedAnswer",
    "Unreachable",
    "VmsOperations",
    "Waited",
]
