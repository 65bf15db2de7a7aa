"""A chat room: its members and their messages. It does not know about sockets."""

from __future__ import annotations

from dataclasses import dataclass

from actors import Actor, Down, Log, Ref, Request, handles


class NameInUse(Exception):
    """A member with this name is in the room."""


class NotInRoom(Exception):
    """The sender is not a member. After a crash the room has no members until they join again."""


@dataclass(frozen=True)
class Join(Request[None]):
    """Asks to join. A member leaves when it ends, if not earlier."""

    name: str
    member: Ref[Actor]
    raises = (NameInUse,)


@dataclass(frozen=True)
class Say(Request[None]):
    """A message to all members."""

    name: str
    text: str
    raises = (NotInRoom,)


class Room(Actor):
    """Writes messages into a log. Each reader has its own cursor in it, so a slow reader blocks nobody."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.members: dict[str, Ref[Actor]] = {}

    @handles(Join)
    async def join(self, message: Join) -> None:
        if self.members.get(message.name, message.member) is not message.member:
            raise NameInUse(message.name)
        self.ctx.monitor(message.member)
        if message.name not in self.members:
            self.members[message.name] = message.member
            self.log.append(f"* {message.name} is here\n".encode())

    @handles(Say)
    async def say(self, message: Say) -> None:
        if message.name not in self.members:
            raise NotInRoom(message.name)
        if message.text == "/crash":
            raise RuntimeError("a bug that is there for you to see what happens")
        self.log.append(f"{message.name}: {message.text}\n".encode())

    @handles(Down)
    async def down(self, message: Down) -> None:
        for name, member in list(self.members.items()):
            if member is message.ref:
                del self.members[name]
                self.log.append(f"* {name} has left\n".encode())

    def inspect(self) -> dict[str, object]:
        return {"members": sorted(self.members), "lines": self.log.newest}
