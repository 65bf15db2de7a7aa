"""Messages and an actor of several tests."""

from __future__ import annotations

from dataclasses import dataclass

from actors import Actor, handles


@dataclass(frozen=True)
class Crash:
    pass


@dataclass(frozen=True)
class Finish:
    pass


@dataclass(frozen=True)
class Note:
    text: str


class Crashing(Actor):
    """Crashes or finishes on request."""

    @handles(Crash)
    async def crash(self, message: Crash) -> None:
        raise ValueError("crashed")

    @handles(Finish)
    async def finish(self, message: Finish) -> None:
        self.ctx.stop()
