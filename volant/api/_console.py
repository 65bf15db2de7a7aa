"""`/ws/v1/vms/{name}/console`: the serial console of a VM.

Binary messages are the console's bytes, in both directions. A text message from the client is typed too, as terminals
in a browser send text; a text message from the daemon is about the stream. A client that wants to type declares it in
the URL: a second such client gets 409 before the WebSocket opens, and a client that only reads never types by mistake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import trio

from volant.concurrency import FairShare
from volant.http import NORMAL, Call, StreamRoute, interruptible
from volant.model import Problem, Status, VmRow
from volant.operations import ApiDeps, record_access
from volant.session import Keyboard, KeyboardTaken, Missed, NotTyped, Reader

from ._session import Session, moved

NOT_ALLOWED = 1008
COME_AGAIN = 1012
"""The VM is still running, and the client can connect again at once."""
OVERLOADED = 1013
"""The guest does not read its input."""
KEYBOARD_TAKEN = 4000

_PATH = re.compile(r"/ws/v1/vms/([^/]*)/console/?\Z")
_TAKEN = "another client has taken the keyboard"
_UP = frozenset({Status.STARTING, Status.RUNNING, Status.PAUSED})
_DEFAULT_TAIL = 25
_MAX_TAIL = 1000


def routes(deps: ApiDeps, share: FairShare) -> list[StreamRoute]:
    """Returns the routes of this resource."""

    async def console(call: Call) -> None:
        name = call.args[0]
        query = call.query(credentials=True)
        tail = query.integer("tail", maximum=_MAX_TAIL)
        write, take = query.flag("write", False), query.flag("take", False)
        query.done()
        row, serial = deps.vms.guests.console(call.named(name))
        async with AsyncExitStack() as stack:
            keyboard = None
            if write or take:
                try:
                    keyboard = stack.enter_context(serial.keyboard(take=take))
                except KeyboardTaken:
                    raise Problem(
                        409, "keyboard-taken", f"another client types on the console of VM {name!r}", vm=name,
                        hint="leave out write=true to read only, or add take=true to take the keyboard from them",
                    ) from None  # fmt: skip
            await record_access(deps, row, "write" if keyboard is not None else "read")
            reader = await stack.enter_async_context(serial.reader(_DEFAULT_TAIL if tail is None else tail))
            await call.accept()
            await _Session(call, deps, share, row, reader, keyboard).run()

    return [StreamRoute(_PATH, console, http=False, websocket=True)]


class _Session(Session):
    """One client at the console."""

    def __init__(
        self, call: Call, deps: ApiDeps, share: FairShare, row: VmRow, reader: Reader, keyboard: Keyboard | None
    ) -> None:
        super().__init__(call)
        self._deps = deps
        self._share = share
        self._row = row
        self._moved = moved(deps, row.id, row.key)
        self._reader = reader
        self._keyboard = keyboard

    def ends(self) -> Iterator[tuple[trio.Event, int, str]]:
        yield from super().ends()
        if self._keyboard is not None:
            yield self._keyboard.lost, KEYBOARD_TAKEN, _TAKEN

    async def send_all(self) -> None:
        async with interruptible(self.over) as waits:
            while (taken := await waits.until(self._reader.take)) is not None:
                if isinstance(taken, Missed):
                    await self.call.send_texts([b'{"missed":%d}' % taken.bytes])
                    continue
                await self._share.take(self._row.id, len(taken))
                await self.call.send_bytes(taken)

    async def take(self, message: Mapping[str, Any]) -> None:
        data = message["bytes"] if message["bytes"] is not None else message["text"].encode()
        if self._keyboard is None:
            self.end(NOT_ALLOWED, "this connection is read-only; connect with write=true to type")
            return
        await self._share.take(self._row.id, len(data))
        try:
            await self._keyboard.type(data)
        except KeyboardTaken:
            self.end(KEYBOARD_TAKEN, _TAKEN)
        except NotTyped as error:
            self.end(OVERLOADED, str(error))

    def reason(self) -> tuple[int, str]:
        elsewhere = self._moved()
        if elsewhere is not None:
            return elsewhere
        row = self._deps.store.projection.by_id(self._row.id)
        if row is None:
            return NORMAL, "the VM is deleted"
        if row.boot_key == self._row.boot_key and row.status in _UP:
            return COME_AGAIN, "the console is reopened; connect again"
        return NORMAL, f"the VM is {row.status.value}"
