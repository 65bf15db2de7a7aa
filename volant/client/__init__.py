"""The typed client of the daemon's HTTP API, for programs on Trio; `volar` is built on it."""

from volant.model import ConsoleGap, Health, LogGap, LogLine, PluginView, Restored, StreamGap, SystemStatus, Ticket

from ._actions import ActionAnswer
from ._address import Address
from ._backups import Backup
from ._browser import Browser, BrowserPage
from ._client import Client
from ._console import Console
from ._errors import ClientError, ClientProblem, ConnectionLost, DeadlineExceeded, UnexpectedAnswer, Unreachable
from ._exec import ExecEnd, ExecOutput, Process
from ._exec_session import ExecGap, ExecSession, RemoteSession
from ._feed import Feed, OnRetry
from ._files import FileInfo, FileReader
from ._operations import (
    NetworksOperations,
    PluginsOperations,
    SnapshotsOperations,
    SystemOperations,
    TemplatesOperations,
    VmsOperations,
)
from ._tcp import TcpStream
from ._types import Command, Reconnected, Waited

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
