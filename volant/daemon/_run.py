"""Runs `volantd` in a process: claims its directories, binds its sockets and runs the daemon until a signal.

Both come first, so that a daemon without them ends at once with an error. The sockets outlive the daemon's parts, so a
part that restarts loses no client's connection.
"""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Sequence
from functools import partial

import apsw
import msgspec
import trio

from volant.journal import DatabaseRefused

from ._admission import Reload
from ._daemon import Daemon
from ._directories import DirectoryError, claimed, remove
from ._settings import DEFAULT_ADDRESS, Settings, split
from ._sockets import ListenError, listening, listening_for_hosts, setting_of
from ._systemd import Notifier

_logger = logging.getLogger("volant.daemon")

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LATE_SIGNAL_S = 0.01


class DaemonError(Exception):
    """The daemon can't run. The text is for the operator."""


async def run(
    settings: Settings,
    reload: Reload | None = None,
    *,
    inherited: Sequence[socket.socket] = (),
    notifier: Notifier | None = None,
) -> None:
    """Runs the daemon until SIGTERM or SIGINT.

    :param reload: loads the settings again on SIGHUP
    :param inherited: sockets to listen on instead of the settings' addresses
    :param notifier: the service manager
    :raises DaemonError: the daemon can't run.
    :raises SettingsError: a key file became invalid since the settings were loaded.
    """
    notifier = notifier or Notifier(None)
    if inherited:
        _warn_of_unused_addresses(inherited, settings)
        settings = _with_addresses(inherited, settings)
        if reload is not None:
            reload = partial(_reload_with_addresses, reload, inherited)
    try:
        # Signals are received until the very end, so that one during the removal of the state does not interrupt it.
        with (
            claimed(settings),
            listening(settings, inherited) as sockets,
            listening_for_hosts(settings) as fleet_sockets,
            trio.open_signal_receiver(*_SIGNALS) as signals,
        ):
            daemon = Daemon(settings, sockets, reload, notifier, fleet_sockets=fleet_sockets)
            left = await daemon.run(signals)
            if settings.ephemeral and left:
                _logger.error("the state is kept, as these VMs still exist: %s", ", ".join(left))
            elif settings.ephemeral:
                remove(settings)
            with trio.move_on_after(_LATE_SIGNAL_S):
                async for _ in signals:
                    pass
    except (DirectoryError, ListenError, DatabaseRefused) as error:
        raise DaemonError(str(error)) from error
    except apsw.Error as error:
        raise DaemonError(f"the database in {settings.state_dir} can't be opened: {error}") from error


def _warn_of_unused_addresses(sockets: Sequence[socket.socket], settings: Settings) -> None:
    bound = [setting_of(sock) for sock in sockets]
    unused = [address for address in split(settings.api_listen_addr) if address not in (*bound, DEFAULT_ADDRESS)]
    if unused:
        _logger.warning(
            "api_listen_addr %s has no effect, as systemd bound %s; change it with `systemctl edit volantd.socket`",
            ", ".join(unused),
            ", ".join(bound),
        )


def _with_addresses(sockets: Sequence[socket.socket], settings: Settings) -> Settings:
    return msgspec.structs.replace(settings, api_listen_addr=",".join(setting_of(sock) for sock in sockets))


def _reload_with_addresses(reload: Reload, sockets: Sequence[socket.socket]) -> tuple[Settings, list[str]]:
    settings, warnings = reload()
    return _with_addresses(sockets, settings), warnings
