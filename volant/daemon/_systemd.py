"""Notifies systemd with sd_notify(3), if systemd started the daemon.

**Ready** is sent when all VMs are adopted; until then the daemon asks systemd for more time. **The watchdog** is fed
after a check: a message goes through the event loop to the journal and back, and the supervisor tree must be complete.
So it is not fed when the loop hangs, when the journal does not answer, or when a child of the tree stays down. A full
disk does not count: the journal reports it, and a restart would not help. Rejected: a thread that feeds it, which would
do so while the loop hangs.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import trio

from volant.host import Scopes

_logger = logging.getLogger("volant.daemon")

SLICE = "volant.slice"
GUESTS_UNIT = "volant-guests.service"
"""The unit that is stopped before the VMs' scopes, and shuts down guests."""

_EXTENSION_S = 60.0
"""Time that each request for more adds while the daemon starts."""
_START_S = 1800.0
"""A start that takes longer hangs, so the daemon asks for no more time."""


class Notifier:
    """Sends notifications to the service manager."""

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        """Creates it. Without a service manager `address` is None, and nothing is sent."""
        self._address = address
        self.watchdog_s = watchdog_s
        """The watchdog's period; None without a watchdog."""
        self._is_ready = False

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Notifier:
        """Creates it from systemd's variables, which it removes from the environment, so that no child process uses
        them."""
        address = environ.pop("NOTIFY_SOCKET", None)
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = not pid or pid == str(os.getpid())
        return cls(address, int(usec) / 1e6 if ours and usec.isdecimal() and int(usec) else None)

    @property
    def is_there(self) -> bool:
        return self._address is not None

    def scopes(self) -> Scopes | None:
        """Returns access to the manager's scopes; its private socket is next to the one for notifications."""
        if self._address is None or not self._address.startswith("/"):
            return None
        private = Path(self._address).parent / "private"
        return Scopes(private, SLICE, before=(GUESTS_UNIT,)) if private.exists() else None

    def notify(self, **variables: str | int) -> None:
        """Sends variables. A failure is only logged, as systemd handles a daemon that does not notify it."""
        if self._address is None:
            return
        text = "\n".join(f"{name}={str(value).replace(chr(10), ' ')}" for name, value in variables.items())
        # `@` stands for the null byte of an abstract socket.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                # Never block the event loop; a lost notification is followed by another.
                sock.setblocking(False)
                sock.sendto(text.encode(), address)
        except OSError as error:
            _logger.warning("systemd can't be notified of %s: %s", ", ".join(variables), error)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """Notifies systemd of a reload for the block."""
        if not self._is_ready:
            # READY=1 would end the reload too early.
            yield
            return
        self.notify(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
        try:
            yield
        finally:
            self.notify(READY=1)

    def stopping(self, status: str) -> None:
        """Notifies systemd that the daemon is stopping."""
        self.notify(STOPPING=1, STATUS=status)

    async def keep(
        self, adopted: Callable[[], bool], find_problem: Callable[[], Awaitable[str | None]], status: Callable[[], str]
    ) -> None:
        """Reports the start, then feeds the watchdog until cancelled.

        :param adopted: returns whether the start is complete
        :param find_problem: returns why the daemon does not work, or None
        :param status: returns a line for people
        """
        if self._address is None:
            return
        began = trio.current_time()
        while not adopted():
            if (took_s := trio.current_time() - began) < _START_S:
                self.notify(STATUS=f"Starting: {status()}", EXTEND_TIMEOUT_USEC=int(_EXTENSION_S * 1e6))
            # Short pauses at first, as most starts are quick.
            await trio.sleep(min(_EXTENSION_S / 4, max(0.02, took_s / 4)))
        self._is_ready = True
        self.notify(READY=1, STATUS=status())
        if self.watchdog_s is None:
            return
        every_s = self.watchdog_s / 3
        while True:
            await trio.sleep(every_s)
            problem: str | None = f"its parts did not answer within {every_s:g} s"
            with trio.move_on_after(every_s):
                problem = await find_problem()
            if problem is None:
                self.notify(WATCHDOG=1, STATUS=status())
            else:
                _logger.error("the watchdog is not fed: %s", problem)
                self.notify(STATUS=f"Not working: {problem}")
