"""`Idempotency-Key`: a repeated POST is executed once, and gets the first response again.

The journal stores a result in the transaction of the change, and only the journal decides whether a request is repeated
(docs/explanation/journal.md). This module computes the digests of a request. A malformed request (400, 408, 413, 415)
is refused before that and not stored: its response is the same each time, and there is no decoded body to compare.
Tickets are not stored either, as secrets must not be written to the disk.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Any, Generic, NamedTuple, TypeVar, cast

import msgspec
from quart import request

from volant.http import one_project
from volant.journal import DuplicateRequest, IdempotencyKey, Refusal, Result, StoreRefusal, ask_journal
from volant.model import Problem, invalid
from volant.operations import ApiDeps

R = TypeVar("R", bound=Result)

_KEY = re.compile(r"[\x21-\x7e]{1,255}\Z")

_encode = msgspec.json.Encoder(order="sorted").encode


class Outcome(NamedTuple, Generic[R]):
    """The result of a request; `replayed` if it is the stored one of the first request."""

    result: R
    replayed: bool = False


class Repeats:
    """Detects repeated requests."""

    def __init__(self, deps: ApiDeps) -> None:
        self._deps = deps
        self._running: set[bytes] = set()

    async def run(self, content: object, act: Callable[[IdempotencyKey | None], Awaitable[R]]) -> Outcome[R]:
        """Executes the current request, unless it was executed before.

        :param content: the parts of the request, besides its path, that must be equal in a repetition
        :param act: executes it; passes its argument to the journal
        :raises Problem: 400, the key is malformed; 409, the first request is still running; 422, the key was used for
            another request; and the errors of `act`
        """
        text = _key()
        if text is None:
            return Outcome(await act(None))
        caller = request.scope["state"]["caller"].id
        project = one_project(request.scope)
        of = (caller, request.method, request.path, project, text)
        key = IdempotencyKey(_digest(of), _digest(content), project)
        stored = self._deps.store.responses.find(key, self._deps.host.clock.now())
        if stored is not None:
            return _replay(stored)
        if key.scope in self._running:
            raise Problem(
                409,
                "idempotency-key-in-use",
                "the request with this Idempotency-Key is still running",
                field="Idempotency-Key",
                hint="send it again in a moment",
            )
        self._running.add(key.scope)
        try:
            return Outcome(await self._act(act, key))
        except DuplicateRequest as duplicate:
            return _replay(duplicate.result)
        finally:
            self._running.discard(key.scope)

    async def _act(self, act: Callable[[IdempotencyKey | None], Awaitable[R]], key: IdempotencyKey) -> R:
        try:
            return await act(key)
        except Problem as refusal:
            # One that says to try again later is no answer to keep.
            if refusal.status < 500 and refusal.status != 429 and refusal.field != "Idempotency-Key":
                await ask_journal(self._deps.journal, StoreRefusal(Refusal.of(refusal), key))
            raise


def _replay(result: Result) -> Outcome[R]:
    if isinstance(result, Refusal):
        raise result.problem()
    # The key counts for one method and path, so for one type of result.
    return Outcome(cast(R, result), replayed=True)


def _key() -> str | None:
    given = request.headers.getlist("Idempotency-Key")
    if not given:
        return None
    if len(given) > 1 or not _KEY.match(given[0]):
        raise invalid(
            "Idempotency-Key",
            "the header Idempotency-Key is not one word of 1 to 255 visible ASCII characters",
            hint="use a UUID, for instance",
        )
    return str(given[0])


def _digest(value: Any) -> bytes:
    return sha256(_encode(value)).digest()
