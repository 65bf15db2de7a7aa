"""`Idempotency-Key`: a POST that is sent again is answered again, and what it asks for is done once.

The journal keeps the answer in the transaction that it tells of, and it alone decides whether a request came before
(docs/explanation/journal.md). Here a request gets its digests, and an answer becomes a response, the first time and
later in the same way. A request that is malformed (400, 408, 413, 415) is judged before and not kept: it would be
answered alike in any case, and has nothing to compare. Neither is a ticket: it is good for one use within a minute, and
no secret belongs on the disk.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar

import msgspec
from quart import Response, request

from actors import ActorDown, AskTimeout
from volant.journal import AlreadyAnswered, Answer, KeepRefusal, Kept, Once, Refusal
from volant.model import Problem, invalid
from volant.operations import ApiDeps

R = TypeVar("R")

_KEY = re.compile(r"[\x21-\x7e]{1,255}\Z")
_ASK_S = 60.0

_encode = msgspec.json.Encoder(order="sorted").encode
_to_json = msgspec.json.Encoder().encode


class Answered(NamedTuple):
    """How a request is answered; `replayed`: how it was the first time."""

    answer: Answer
    replayed: bool

    def now(self, seen: Answer) -> Answered:
        """With what it tells of as it is now."""
        headers = {**self.answer.headers, **seen.headers}
        return self._replace(answer=msgspec.structs.replace(seen, status=self.answer.status, headers=headers))

    def response(self) -> Response:
        """As it goes out."""
        response = Response(self.answer.body, status=self.answer.status, content_type="application/json")
        response.headers.extend(self.answer.headers)
        if self.replayed:
            response.headers["Idempotency-Replayed"] = "true"
        return response


class Repeats:
    """Knows the requests that came before and those under way."""

    def __init__(self, deps: ApiDeps) -> None:
        self._deps = deps
        self._under_way: set[bytes] = set()

    async def answer(
        self, asked: object, act: Callable[[Once | None], Awaitable[R]], make: Callable[[R], Answer]
    ) -> Answered:
        """Act on the request under way, unless it came before.

        :param asked: what it wants, decoded: with the same key the same must be asked
        :param act: does it; hands its argument on to the journal
        :param make: from what `act` gives to the answer; pure
        :raises Problem: 400 the key, 409 the first is under way, 422 the key stands for something else, or as `act`
        """
        key = _key()
        if key is None:
            return Answered(make(await act(None)), False)
        once = Once(
            _digest([request.scope["state"]["caller"], request.method, request.path, key]), _digest(asked), make
        )
        kept = self._deps.store.answers.find(once, self._deps.host.wall_clock())
        if kept is not None:
            return _again(kept)
        if once.scope in self._under_way:
            raise Problem(
                409,
                "idempotency-key-in-use",
                "the request with this Idempotency-Key is under way",
                field="Idempotency-Key",
                hint="send it again in a moment",
            )
        self._under_way.add(once.scope)
        try:
            return Answered(make(await self._act(act, once)), False)
        except AlreadyAnswered as before:
            return _again(before.kept)
        finally:
            self._under_way.discard(once.scope)

    async def _act(self, act: Callable[[Once | None], Awaitable[R]], once: Once) -> R:
        try:
            return await act(once)
        except Problem as refusal:
            if refusal.status < 500 and refusal.field != "Idempotency-Key":
                await self._keep(KeepRefusal(Refusal.of(refusal), once))
            raise

    async def _keep(self, message: KeepRefusal) -> None:
        try:
            await self._deps.journal.ask(message, timeout_s=_ASK_S)
        except (ActorDown, AskTimeout) as error:
            raise Problem(
                503, "journal-down", f"the journal could not keep the answer: {error}", hint="try again"
            ) from error  # fmt: skip


def answer_of(value: object, status: int = 200, *, vm_id: int | None = None, **headers: str) -> Answer:
    """`value` as JSON, with these headers."""
    return Answer(status, headers, _to_json(value).decode(), vm_id)


def _again(kept: Kept) -> Answered:
    if kept.refusal is not None:
        raise kept.refusal.problem()
    assert kept.answer is not None
    return Answered(kept.answer, True)


def _key() -> str | None:
    given = request.headers.getlist("Idempotency-Key")
    if not given:
        return None
    if len(given) > 1 or not _KEY.match(given[0]):
        raise invalid(
            "Idempotency-Key",
            "the header Idempotency-Key is not one word of 1 to 255 visible ASCII characters",
            hint="a UUID is a good one",
        )
    return str(given[0])


def _digest(value: Any) -> bytes:
    return sha256(_encode(value)).digest()
