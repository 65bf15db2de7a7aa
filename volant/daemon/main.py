"""The entry point of `volantd`."""

from __future__ import annotations

import logging
import os
import sys
import time
from functools import partial

import trio

from volant.host import Host

from . import _dump
from ._check import check
from ._daemon import DaemonError, run
from ._descriptors import ADVICE, most_vms, raise_limit, shortage, suffices
from ._journald import JournalHandler, is_journal
from ._offline import restore
from ._settings import SettingsError, parse_command, resolve
from ._sockets import ListenError, handed_in
from ._systemd import Notifier


def main() -> None:
    """Run the daemon until a signal ends it; exit code 0 then, 1 when it can't run, 2 for settings that don't fit."""
    _dump.before()
    try:
        notifier = Notifier.from_environment(os.environ)
        sockets = handed_in(os.environ)
        environ = dict(os.environ)
        # No process that we start may inherit it.
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
        # Where lines have no fields, `volar events` is the better place for them.
        logging.getLogger("volant.event").setLevel(logging.WARNING)
        _log_to_stderr(settings.log_level.upper())
    # Each request logs a line, so what a line costs counts: half of it is for what ours do not say.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    # It logs every header at this level.
    logging.getLogger("hpack").setLevel(logging.WARNING)
    for warning in warnings:
        logging.getLogger("volant.daemon").warning("%s", warning)
    limit = raise_limit()
    try:
        if command.name == "check":
            report, code = check(settings)
            _say(report)
            sys.exit(code)
        if command.file is not None:
            _say(restore(settings, command.file, replace=command.replace))
            return
        if not suffices(limit, vms := most_vms(settings, Host())):
            logging.getLogger("volant.daemon").warning(
                "the daemon may open %d files and sockets: %s; %s", limit, shortage(limit, vms), ADVICE
            )
        trio.run(partial(run, settings, again, handed_in=sockets, notifier=notifier))
    except SettingsError as error:
        sys.exit(_complain(str(error), 2))
    except DaemonError as error:
        sys.exit(_complain(str(error), 1))
    except KeyboardInterrupt:
        sys.exit(130)


class _Formatter(logging.Formatter):
    """Writes the time of a line; what of it changes once a second is made once a second."""

    _second = -1
    _text = ""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        second = int(record.created)
        if second != self._second:
            self._text = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second))
            self._second = second
        return f"{self._text},{int(record.msecs):03d}"


def _log_to_stderr(level: str) -> None:
    """Lines for people."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


def _say(text: str) -> None:
    print(text)  # noqa: T201


def _complain(text: str, code: int) -> int:
    print(f"volantd: {text}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    main()
