"""The logs of VMs: lines of consoles and workloads in files, with a bounded ring in memory for readers."""

from ._cursor import LogCursor as LogCursor, LogGap as LogGap
from ._log import (
    MAX_LINE_BYTES as MAX_LINE_BYTES,
    LogEntry as LogEntry,
    LogStatistics as LogStatistics,
    LogStream as LogStream,
    VmLog as VmLog,
)
from ._logs import VmLogs as VmLogs
