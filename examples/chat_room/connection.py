"""One client of the chat, on any byte stream: an actor with two tasks."""

from __future__ import annotations

import trio

from actors import Actor, ActorDown, Down, Gap, Log, Ref, handles

from .room import Join, NameInUse, NotInRoom, Room, Say

LINE_MAX = 1000
SEND_S = 10.0


class Connection(Actor):
    """Joins the room and passes messages both ways. It ends when its client leaves, and only then."""

    def __init__(self, stream: trio.abc.Stream, room: Ref[Room], log: Log) -> None:
        self.stream = stream
        self.room = room
        self.log = log
        self.name = ""
        self.sending = trio.Lock()

    async def on_start(self) -> None:
        self.ctx.stack.push_async_callback(self.stream.aclose)
        self.ctx.spawn(self.read)

    async def read(self) -> None:
        """Receives lines from the client; the first one is its name."""
        lines = Lines(self.stream)
        await self.send(b"your name?\n")
        while not self.name:
            name = await lines.next()
            if name is None:
                return self.ctx.stop()
            if name and await self.join(name):
                self.name = name
        self.ctx.spawn(self.write, self.log.newest)
        self.ctx.monitor(self.room)
        while (text := await lines.next()) is not None:
            await self.say(text)
        self.ctx.stop()

    async def join(self, name: str) -> bool:
        """Joins the room; returns whether the client is in it now."""
        try:
            await self.room.ask(Join(name, self.ctx.self_ref), timeout_s=5)
        except NameInUse:
            await self.send(b"that name is taken; your name?\n")
            return False
        return True

    async def say(self, text: str) -> None:
        """Says a line, and tries again if the room has just restarted and lost its members."""
        for _ in range(2):
            try:
                return await self.room.ask(Say(self.name, text), timeout_s=5)
            except NotInRoom:
                await self.join(self.name)
            except ActorDown:
                return await self.send(b"! the room crashed, and that was lost\n")
        await self.send(b"! you are not in the room\n")

    async def write(self, after: int) -> None:
        """Sends the room's messages. A client that is too slow is told how many it missed, or dropped."""
        async with self.log.cursor(after=after) as cursor:
            while found := await cursor.take(64 * 1024):
                if isinstance(found, Gap):
                    await self.send(f"! you missed {found.oldest - found.after - 1} lines\n".encode())
                else:
                    await self.send(b"".join(line for _, line in found))

    async def send(self, data: bytes) -> None:
        try:
            with trio.fail_after(SEND_S):
                async with self.sending:
                    await self.stream.send_all(data)
        except trio.BrokenResourceError:
            self.ctx.stop()

    @handles(Down)
    async def room_is_down(self, message: Down) -> None:
        self.ctx.spawn(self.come_back)

    async def come_back(self) -> None:
        """The room crashed; it is back, or will be soon."""
        for pause_s in (0.0, 0.1, 1.0, 10.0):
            await trio.sleep(pause_s)
            try:
                await self.join(self.name)
            except ActorDown:
                continue
            return self.ctx.monitor(self.room)
        self.ctx.stop()


class Lines:
    """Splits a byte stream into lines of text; cuts lines longer than `LINE_MAX`."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.rest = b""

    async def next(self) -> str | None:
        """Returns the next line, or None at the end of the stream."""
        while b"\n" not in self.rest:
            try:
                data = await self.stream.receive_some(4096)
            except trio.BrokenResourceError:
                return None
            if not data:
                return None
            self.rest = (self.rest + data)[-LINE_MAX:]
        line, _, self.rest = self.rest.partition(b"\n")
        return line.decode(errors="replace").strip()
