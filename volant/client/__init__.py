"""The typed client of the daemon's HTTP API, for programs on Trio; `volar` is built on it."""

from volant.model import Health, LogGap, LogLine, PluginView, StreamGap, SystemStatus, Ticket

from ._client import Client
from ._errors import ClientError, ClientProblem, ConnectionLost, DeadlineExceeded, UnexpectedAnswer, Unreachable
from ._exec import ExecEnd, ExecOutput, Process
from ._feed import Feed
from ._types import Waited

__all__ = [
    "Client",
    "ClientError",
    "ClientProblem",
    "ConnectionLost",
    "DeadlineExceeded",
    "ExecEnd",
    "ExecOutput",
    "Feed",
    "Health",
    "LogGap",
    "LogLine",
    "PluginView",
    "Process",
    "StreamGap",
    "SystemStatus",
    "Ticket",
    "UnexpectedAnswer",
    "Unreachable",
    "Waited",
]
