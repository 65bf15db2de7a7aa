"""What was answered to requests that may come again, so that they are answered alike and not taken up twice."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from datetime import datetime
from typing import Any

import msgspec

from volant.model import Problem
from volant.model.stored import BadMember

MAX_ANSWERS = 10_000
MAX_BYTES = 16 * 1024 * 1024
MAX_AGE_S = 24 * 3600

_OVERHEAD = 600
_HEADER = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,63}\Z")
_HEADER_VALUE = re.compile(r"[\x20-\x7e]{0,1024}\Z")


class Answer(msgspec.Struct, frozen=True):
    """What a request was answered with."""

    status: int
    headers: dict[str, str]
    """Those that belong to what was done."""
    body: str
    """JSON."""
    vm_id: int | None = None
    """The VM that it tells of."""


class Refusal(msgspec.Struct, frozen=True):
    """The `Problem` that a request was refused with."""

    status: int
    code: str
    detail: str
    field: str | None
    hint: str | None
    vm: str | None

    @classmethod
    def of(cls, problem: Problem) -> Refusal:
        return cls(problem.status, problem.code, problem.detail, problem.field, problem.hint, problem.vm)

    def problem(self) -> Problem:
        """It again."""
        return Problem(self.status, self.code, self.detail, field=self.field, hint=self.hint, vm=self.vm)


class Once(msgspec.Struct, frozen=True):
    """Marks a request as one that may come again and is taken up once."""

    scope: bytes
    """A digest of who asks for what under which key."""
    asked: bytes
    """A digest of what exactly is asked; the same key can't be used for something else."""
    answer: Callable[[Any], Answer]
    """Makes the answer from what the journal replies. Pure, as it runs in the middle of a transaction."""


class Kept(msgspec.Struct, frozen=True):
    """An answer, or a refusal, and what it was given to. The time is in seconds since 1970."""

    scope: bytes
    asked: bytes
    at: int
    answer: Answer | None
    refusal: Refusal | None = None

    @property
    def size(self) -> int:
        """Bytes that it occupies, roughly."""
        answer, refusal = self.answer, self.refusal
        said = len(answer.body) if answer is not None else 0
        if refusal is not None:
            said += len(refusal.detail) + len(refusal.hint or "") + len(refusal.field or "")
        return said + _OVERHEAD


class Answers:
    """What is kept, in memory, the oldest first. Anybody reads it; the journal alone writes it, after each commit."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Kept] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, once: Once, now: datetime) -> Kept | None:
        """What was answered within the last 24 hours. :raises Problem: 422 to something else, under the same key."""
        kept = self._kept.get(once.scope)
        return None if kept is None or _is_over(kept, now) else check_same(kept, once)

    # For the journal alone

    def surplus(self, new: Collection[Kept], now: datetime) -> list[bytes]:
        """The scopes of those that have to go when `new` come."""
        coming = {kept.scope for kept in new}
        count = len(self._kept) + len(new)
        size = self._bytes + sum(kept.size for kept in new)
        gone = []
        for kept in self._kept.values():
            if count <= MAX_ANSWERS and size <= MAX_BYTES and not _is_over(kept, now):
                break
            count -= 1
            size -= kept.size
            if kept.scope not in coming:
                gone.append(kept.scope)
        return gone

    def replace(self, kept: Iterable[Kept]) -> None:
        """Become what was loaded from the disk."""
        self._kept = {one.scope: one for one in sorted(kept, key=lambda one: one.at)}
        self._bytes = sum(one.size for one in self._kept.values())

    def apply(self, new: Iterable[Kept], gone: Iterable[bytes]) -> None:
        """Take over what a commit changed."""
        for scope in gone:
            self._forget(scope)
        for kept in new:
            self._forget(kept.scope)
            self._kept[kept.scope] = kept
            self._bytes += kept.size

    def _forget(self, scope: bytes) -> None:
        old = self._kept.pop(scope, None)
        if old is not None:
            self._bytes -= old.size


def check_kept(kept: Kept) -> None:
    """:raises BadMember: it is no answer of this daemon's: a header of it could be another answer."""
    said = kept.answer or kept.refusal
    if said is not None and not 200 <= said.status <= 599:
        raise BadMember("status", said.status, "which is no status of an answer")
    for name, value in (kept.answer.headers if kept.answer is not None else {}).items():
        if not _HEADER.match(name) or not _HEADER_VALUE.match(value):
            raise BadMember(f"answer.headers[{name[:40]!r}]", value, "which is no header of an answer")


def check_same(kept: Kept, once: Once) -> Kept:
    """:raises Problem: 422 something else was asked for under this key."""
    if kept.asked == once.asked:
        return kept
    raise Problem(
        422,
        "idempotency-key-reused",
        "this Idempotency-Key was used for another request",
        field="Idempotency-Key",
        hint="take a new key for each request, and the same one only to send a request again",
    )


def _is_over(kept: Kept, now: datetime) -> bool:
    return kept.at + MAX_AGE_S <= now.timestamp()
