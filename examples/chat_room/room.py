"""A chat room: who is in it, and what was said. It knows nothing of sockets."""

from __future__ import annotations

from dataclasses import dataclass

from actors import Actor, Down, Log, Ref, Request, handles


class NameInUse(Exception):
    """Somebody of that name is in the room."""


class NotInRoom(Exception):
    """Whoever isn't in the room can't be heard there. After a crash of the room nobody is, until they join again."""


@dataclass(frozen=True)
class Join(Request[None]):
    """From whoever wants to be in the room, and leaves it at the latest when it dies."""

    name: str
    member: Ref[Actor]
    raises = (NameInUse,)


@dataclass(frozen=True)
class Say(Request[None]):
    """Something for all in the room to read."""

    name: str
    text: str
    raises = (NotInRoom,)


class Room(Actor):
    """Writes what is said into a log. Readers have their cursors in that, so no reader holds up the room or another."""

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
