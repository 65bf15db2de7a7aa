"""`/ws/v1/vms/{name}/console`: the serial console of a VM.

Binary messages are the console's bytes, both ways. A text message from the client is typed too, as terminals in a
browser send text; one from here is a word about the stream. Whoever wants to type says so in the URL, so that a second
one is told 409 before anything else, and who only looks on never types by mistake.

What ends a session is told between two messages, never in the middle of one; only a client that has left is not waited
for.
"""

from __future__ import annotations

import re
from contextlib import AsyncExitStack

import trio

from volant.concurrency import FairShare
from volant.http import GOING_AWAY, NORMAL, Call, StreamRoute, interruptible
from volant.model import Problem, Status, VmRow
from volant.operations import ApiDeps
from volant.vm import Keyboard, KeyboardTaken, Missed, NotTyped, Reader

NOT_ALLOWED = 1008
COME_AGAIN = 1012
"""The VM runs on, and its console is taken up again at once."""
OVERLOADED = 1013
"""The guest does not read what is typed."""
KEYBOARD_TAKEN = 4000

_PATH = re.compile(r"/ws/v1/vms/([^/]*)/console/?\Z")
_TAKEN = "another client has taken the keyboard"
_UP = frozenset({Status.STARTING, Status.RUNNING, Status.PAUSED})
_DEFAULT_TAIL = 25
_MAX_TAIL = 1000


def routes(deps: ApiDeps, share: FairShare) -> list[StreamRoute]:
    """The routes of this resource."""

    async def console(call: Call) -> None:
        name = call.args[0]
        query = call.query(credentials=True)
        tail = query.integer("tail", maximum=_MAX_TAIL)
        write, take = query.flag("write", False), query.flag("take", False)
        query.done()
        row, serial = deps.vms.streams.console(name)
        async with AsyncExitStack() as stack:
            keyboard = None
            if write or take:
                try:
                    keyboard = stack.enter_context(serial.keyboard(take=take))
                except KeyboardTaken:
                    raise Problem(
                        409, "keyboard-taken", f"another client types on the console of VM {name!r}", vm=name,
                        hint="leave out write=true to look on, or add take=true to take the keyboard from them",
                    ) from None  # fmt: skip
            reader = await stack.enter_async_context(serial.reader(_DEFAULT_TAIL if tail is None else tail))
            await call.accept()
            await _Session(call, deps, share, row, reader, keyboard).run()

    return [StreamRoute(_PATH, console, http=False, websocket=True)]


class _Session:
    """One client at the console."""

    def __init__(
        self, call: Call, deps: ApiDeps, share: FairShare, row: VmRow, reader: Reader, keyboard: Keyboard | None
    ) -> None:
        self._call = call
        self._deps = deps
        self._share = share
        self._row = row
        self._reader = reader
        self._keyboard = keyboard
        self._over = trio.Event()
        self._ending: tuple[int, str] | None = None
        self._left = False

    async def run(self) -> None:
        """Runs until one of the sides ends, or another client takes the keyboard."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._end_on, self._call.stopping, GOING_AWAY, "the daemon stops")
            if self._keyboard is not None:
                nursery.start_soon(self._end_on, self._keyboard.lost, KEYBOARD_TAKEN, _TAKEN)
            nursery.start_soon(self._from_client, nursery.cancel_scope)
            await self._to_client()
            nursery.cancel_scope.cancel()
        if not self._left:
            await self._call.close(*(self._ending or self._end_of_console()))

    def _end(self, code: int, reason: str) -> None:
        if self._ending is None:
            self._ending = code, reason
            self._over.set()

    async def _end_on(self, event: trio.Event, code: int, reason: str) -> None:
        await event.wait()
        self._end(code, reason)

    async def _to_client(self) -> None:
        async with interruptible(self._over) as waits:
            while (taken := await waits.until(self._reader.take)) is not None:
                if isinstance(taken, Missed):
                    await self._call.send_texts([b'{"missed":%d}' % taken.bytes])
                    continue
                await self._share.take(self._row.id, len(taken))
                await self._call.send_bytes(taken)

    async def _from_client(self, scope: trio.CancelScope) -> None:
        while (message := await self._call.receive())["type"] != "websocket.disconnect":
            if message["type"] == "websocket.receive" and self._ending is None:
                data = message["bytes"] if message["bytes"] is not None else message["text"].encode()
                await self._type(data)
        self._left = True
        scope.cancel()

    async def _type(self, data: bytes) -> None:
        if self._keyboard is None:
            self._end(NOT_ALLOWED, "this connection looks on; connect with write=true to type")
            return
        await self._share.take(self._row.id, len(data))
        try:
            await self._keyboard.type(data)
        except KeyboardTaken:
            self._end(KEYBOARD_TAKEN, _TAKEN)
        except NotTyped as error:
            self._end(OVERLOADED, str(error))

    def _end_of_console(self) -> tuple[int, str]:
        row = self._deps.store.projection.by_id(self._row.id)
        if row is None:
            return NORMAL, "the VM is deleted"
        if row.boot_key == self._row.boot_key and row.status in _UP:
            return COME_AGAIN, "the console is taken up again"
        return NORMAL, f"the VM is {row.status.value}"
