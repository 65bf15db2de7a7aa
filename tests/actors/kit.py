"""Messages of several tests."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Crash:
    pass


@dataclass(frozen=True)
class Finish:
    pass


@dataclass(frozen=True)
class Note:
    text: str
