"""What the daemon tells systemd, where systemd has started it; elsewhere all of this does nothing.

**Ready** is said once every VM that there was has been taken up; while that takes long, systemd is asked for more
time, for as long as it goes on. **The watchdog** is fed by an answer, and not by a clock: each time, a message goes
through the event loop to the journal and back, and the supervisor tree must be whole. So it is not fed when the loop
hangs (nothing is sent), when the journal does not answer, or when a child of the tree stays down. A disk that is full
is none of these: the journal says so to whoever asks, and a restart would not help. A thread that feeds it was
rejected: it would go on while the loop hangs, which is the case that a watchdog is for.

The protocol (sd_notify(3)) is one datagram to the socket that `NOTIFY_SOCKET` names. A library for it would be a
dependency for ten lines.
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
"""Stopped before the VMs' scopes are: it asks the guests to shut down."""

_PATIENCE_S = 60.0
"""What is asked for at once while starting; asked again long before it is over."""
_START_S = 1800.0
"""Then no more is asked for: a start that takes longer hangs."""


class Notifier:
    """The way to the service manager."""

    def __init__(self, address: str | None, watchdog_s: float | None = None) -> None:
        """`address` None: there is no manager, and nothing is said."""
        self._address = address
        self.watchdog_s = watchdog_s
        """Within what time it wants to hear from us."""
        self._is_ready = False

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str]) -> Notifier:
        """Take what systemd has left in the environment, so that no process of ours takes it for its own."""
        address = environ.pop("NOTIFY_SOCKET", None)
        usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        ours = not pid or pid == str(os.getpid())
        return cls(address, int(usec) / 1e6 if ours and usec.isdecimal() and int(usec) else None)

    @property
    def is_there(self) -> bool:
        return self._address is not None

    def scopes(self) -> Scopes | None:
        """The scopes of the manager that has started us; its private socket lies beside the one for notices."""
        if self._address is None or not self._address.startswith("/"):
            return None
        private = Path(self._address).parent / "private"
        return Scopes(private, SLICE, before=(GUESTS_UNIT,)) if private.exists() else None

    def say(self, **facts: str | int) -> None:
        """Send these facts. What can't be sent is logged: systemd then does what it does to a daemon that is mute."""
        if self._address is None:
            return
        text = "\n".join(f"{name}={str(value).replace(chr(10), ' ')}" for name, value in facts.items())
        # A name that begins with @ lies in no file system.
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                # Never wait here, in the event loop: one that is lost is followed by another.
                sock.setblocking(False)
                sock.sendto(text.encode(), address)
        except OSError as error:
            _logger.warning("systemd can't be told %s: %s", ", ".join(facts), error)

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """The settings are read anew in this block."""
        if not self._is_ready:
            # What ends a reload is that the daemon is ready.
            yield
            return
        self.say(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)
        try:
            yield
        finally:
            self.say(READY=1)

    def stopping(self, status: str) -> None:
        """The end has begun."""
        self.say(STOPPING=1, STATUS=status)

    async def keep(
        self, adopted: Callable[[], bool], is_well: Callable[[], Awaitable[str | None]], status: Callable[[], str]
    ) -> None:
        """Tell of the start, then feed the watchdog until cancelled.

        `adopted`: whether the start is over; `is_well`: None, or what ails the daemon; `status`: a line for people.
        """
        if self._address is None:
            return
        began = trio.current_time()
        while not adopted():
            if (took_s := trio.current_time() - began) < _START_S:
                self.say(STATUS=f"Starting: {status()}", EXTEND_TIMEOUT_USEC=int(_PATIENCE_S * 1e6))
            # Quick at first, as most starts are; no event tells of it, and this ends with the start.
            await trio.sleep(min(_PATIENCE_S / 4, max(0.02, took_s / 4)))
        self._is_ready = True
        self.say(READY=1, STATUS=status())
        if self.watchdog_s is None:
            return
        every_s = self.watchdog_s / 3
        while True:
            await trio.sleep(every_s)
            ailment: str | None = f"its parts did not answer within {every_s:g} s"
            with trio.move_on_after(every_s):
                ailment = await is_well()
            if ailment is None:
                self.say(WATCHDOG=1, STATUS=status())
            else:
                _logger.error("the watchdog is not fed: %s", ailment)
                self.say(STATUS=f"Unwell: {ailment}")
