"""Cuts texts for models: the head and the tail of a text that is too long, with a marker between them.

Long texts cost a model money and attention, so each text has a budget. It counts bytes of JSON, in which a control
character takes six, as clients get JSON.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec

T = TypeVar("T")

MAX_TEXT = 64 * 1024
"""Maximum size of one text in an answer, in bytes."""
BUDGET = 56 * 1024
"""Maximum size of the variable parts of an answer together, in bytes, which leaves room for the rest."""

_encode = msgspec.json.Encoder().encode


class Window:
    """The first and the last bytes of a stream of any length."""

    def __init__(self, part_bytes: int = BUDGET) -> None:
        self.size = 0
        """Bytes of the stream so far."""
        self._part = part_bytes
        self._head = bytearray()
        self._tail = bytearray()

    def add(self, data: bytes) -> None:
        """Adds the next bytes."""
        self.size += len(data)
        room = self._part - len(self._head)
        if room > 0:
            self._head += data[:room]
            data = data[room:]
        self._tail += data
        if len(self._tail) > 4 * self._part:
            del self._tail[: -self._part]

    @property
    def head(self) -> bytes:
        """The first bytes; all of them if `is_whole`."""
        return bytes(self._head + self._tail) if self.is_whole else bytes(self._head)

    @property
    def is_whole(self) -> bool:
        """Whether nothing has been dropped."""
        return self.size == len(self._head) + len(self._tail)

    def text(self, budget: int) -> tuple[str, bool]:
        """Returns the stream as text of at most `budget` bytes of JSON, and whether the text is complete. Bytes that
        are not UTF-8 become U+FFFD."""
        if self.is_whole:
            whole = self.head.decode("utf-8", "replace")
            clipped = clip(whole, budget)
            return clipped, clipped is whole
        head, tail = bytes(self._head).decode("utf-8", "replace"), bytes(self._tail).decode("utf-8", "replace")
        return joined(head, tail, self.size, budget)[0], False


def weight(value: object) -> int:
    """Returns the size of `value` as JSON, in bytes."""
    return len(_encode(value))


def clip(text: str, budget: int) -> str:
    """Returns `text` itself, or its head and tail with a marker, in at most `budget` bytes of JSON."""
    if weight(text) <= budget:
        return text
    return joined(text, text, len(text.encode("utf-8", "replace")), budget)[0]


def joined(head: str, tail: str, size: int, budget: int) -> tuple[str, int]:
    """Returns as much of a head and a tail as fits, with a marker for the number of the `size` bytes that are left out;
    and the number of bytes of the head that fit."""
    half = max(0, (budget - 80) // 2)
    head, tail = prefix(head, half), _suffix(tail, half)
    shown = len(head.encode("utf-8", "replace"))
    left_out = max(1, size - shown - len(tail.encode("utf-8", "replace")))
    return f"{head}\n[… {left_out} bytes left out …]\n{tail}", shown


def prefix(text: str, budget: int) -> str:
    """Returns as many of the first characters as fit into `budget` bytes of JSON."""
    text = text[:budget]
    return text[: bisect_right(range(1, len(text) + 1), budget, key=lambda count: weight(text[:count]))]


def _suffix(text: str, budget: int) -> str:
    text = text[-budget:] if budget else ""
    count = bisect_right(range(1, len(text) + 1), budget, key=lambda count: weight(text[-count:]))
    return text[len(text) - count :]


def fitting(items: Iterable[T], budget: int = BUDGET) -> list[T]:
    """Returns as many of the first items as fit, and at least one if there is any."""
    taken: list[T] = []
    for item in items:
        budget -= weight(item) + 1
        if budget < 0 and taken:
            break
        taken.append(item)
    return taken


def fitting_last(items: Sequence[T], budget: int = BUDGET) -> list[T]:
    """Returns as many of the last items as fit, in their order."""
    return fitting(reversed(items), budget)[::-1]
