"""The program `volantd`: its settings, its log and its sub-commands."""

from __future__ import annotations

import logging
import os
import sys
import time
from functools import partial

import trio

from volant.host import Host

from . import _dump
from ._command_line import parse_command
from ._descriptors import ADVICE, most_vms, raise_limit, shortage, suffices
from ._journald import JournalHandler, is_journal
from ._run import DaemonError, run as run_daemon
from ._settings import SettingsError, resolve
from ._sockets import ListenError, inherited_sockets
from ._systemd import Notifier


def run() -> None:
    """Runs the daemon or a sub-command. Exits with 0 after a signal, 1 if it can't run, 2 for invalid settings."""
    _dump.before()
    try:
        notifier = Notifier.from_environment(os.environ)
        sockets = inherited_sockets(os.environ)
        environ = dict(os.environ)
        # Child processes must not inherit the key.
        os.environ.pop("VOLANT_API_KEY", None)
        command = parse_command(sys.argv[1:])
        again = partial(resolve, command.flags, environ)
        settings, warnings = again()
    except SettingsError as error:
        sys.exit(_complain(str(error), 2))
    except ListenError as error:
        sys.exit(_complain(str(error), 1))
    if is_journal(sys.stderr.fileno(), environ):
        logging.basicConfig(level=settings.log_level.upper(), handlers=[JournalHandler("volantd")])
    else:
        # Without the journal's fields, events are better read with `volar events`, and records with `volar audit`.
        logging.getLogger("volant.event").setLevel(logging.WARNING)
        logging.getLogger("volant.audit").setLevel(logging.WARNING)
        _log_to_stderr(settings.log_level.upper())
    # Each request logs a line, and collecting these unused facts is half of its cost.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # At level debug it logs every header.
    logging.getLogger("hpack").setLevel(logging.WARNING)
    for warning in warnings:
        logging.getLogger("volant.daemon").warning("%s", warning)
    limit = raise_limit()
    try:
        if command.name == "check":
            from ._check import check

            report, code = check(settings)
            _say(report)
            sys.exit(code)
        if command.name == "check-fleet":
            from ._check_fleet import check_fleet

            _say(check_fleet(settings))
            return
        if command.file is not None:
            from ._offline import restore

            _say(restore(settings, command.file, replace=command.replace))
            return
        if not suffices(limit, vms := most_vms(settings, Host())):
            logging.getLogger("volant.daemon").warning(
                "the daemon may open %d files and sockets: %s; %s", limit, shortage(limit, vms), ADVICE
            )
        trio.run(partial(run_daemon, settings, again, inherited=sockets, notifier=notifier))
    except SettingsError as error:
        sys.exit(_complain(str(error), 2))
    except DaemonError as error:
        sys.exit(_complain(str(error), 1))
    except KeyboardInterrupt:
        sys.exit(130)


class _Formatter(logging.Formatter):
    """Formats times, and caches the part that changes once per second."""

    _second = -1
    _text = ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second = int(record.created)
        if second != self._second:
            self._text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            self._second = second
        return f"{self._text},{int(record.msecs):03d}"


def _log_to_stderr(level: str) -> None:
    """Logs lines for people."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def _say(text: str) -> None:
    print(text)  # noqa: T201


def _complain(text: str, code: int) -> int:
    print(f"volantd: {text}", file=sys.stderr)  # noqa: T201
    return code
