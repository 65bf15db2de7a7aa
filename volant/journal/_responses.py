"""Stored responses: the answers to requests with an idempotency key, so that a repeated request is not executed
again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import datetime

import msgspec

from volant.model import DEFAULT_PROJECT, Problem

from ._results import Result

MAX_RESPONSES = 10_000
MAX_BYTES = 16 * 1024 * 1024
MAX_AGE_S = 24 * 3600

_OVERHEAD = 600
"""Bytes that a stored response occupies besides its result, roughly."""

_encode = msgspec.json.Encoder().encode
_decode: Callable[[bytes], Result] = msgspec.json.Decoder(Result).decode


class IdempotencyKey(msgspec.Struct, frozen=True):
    """Identifies a request that may be sent again."""

    scope: bytes
    """A digest of the client's key, and of the caller, method and path that it counts for."""
    request: bytes
    """A digest of what is requested: the same key can't stand for another request."""
    project: str = DEFAULT_PROJECT
    """The project of the request, whose share of the stored responses it takes."""


class StoredResponse(msgspec.Struct, frozen=True):
    """The result of a request. It stays encoded, as it is rarely read and thousands are in memory."""

    key: IdempotencyKey
    at: int
    """The time of the response, in seconds since 1970."""
    encoded: bytes
    """The JSON of the result."""

    @classmethod
    def of(cls, key: IdempotencyKey, now: datetime, result: Result) -> StoredResponse:
        return cls(key, int(now.timestamp()), _encode(result))

    @property
    def result(self) -> Result:
        """The decoded result. :raises msgspec.ValidationError: it is not a result, which is possible in a database."""
        return _decode(self.encoded)

    @property
    def size(self) -> int:
        return len(self.encoded) + _OVERHEAD

    def result_for(self, key: IdempotencyKey) -> Result:
        """Returns the result. :raises Problem: 422 when the key was used for another request."""
        if self.key.request == key.request:
            return self.result
        raise Problem(
            422,
            "idempotency-key-reused",
            "this Idempotency-Key was used for another request",
            field="Idempotency-Key",
            hint="use a new key for each request, and the same key only to send a request again",
        )

    def is_expired(self, now: datetime) -> bool:
        return self.at + MAX_AGE_S <= now.timestamp()


class StoredResponses:
    """The stored responses in memory, the oldest first. Everybody may read; only the journal writes, after a commit.

    Projects share the limits: the project that takes the largest share of them makes room. So no project removes the
    responses of one that takes less.
    """

    def __init__(self) -> None:
        self._by_scope: dict[bytes, StoredResponse] = {}
        self._by_project: dict[str, dict[bytes, StoredResponse]] = {}
        self._sizes: Counter[str] = Counter()
        """The bytes of each project."""

    def __len__(self) -> int:
        return len(self._by_scope)

    def find(self, key: IdempotencyKey, now: datetime) -> Result | None:
        """Returns the result of the last 24 hours. :raises Problem: 422 when the key was used for another request."""
        stored = self._by_scope.get(key.scope)
        return None if stored is None or stored.is_expired(now) else stored.result_for(key)

    # For the journal alone

    def surplus(self, new: Collection[StoredResponse], now: datetime) -> list[bytes]:
        """Returns the scopes of the responses that expire, or have to make room for `new`."""
        counts = Counter({project: len(kept) for project, kept in self._by_project.items()})
        sizes = self._sizes.copy()
        for response in new:
            counts[response.key.project] += 1
            sizes[response.key.project] += response.size
        surplus: set[bytes] = set()
        for response in self._oldest(counts, sizes, now):
            counts[response.key.project] -= 1
            sizes[response.key.project] -= response.size
            surplus.add(response.key.scope)
        return list(surplus.difference(response.key.scope for response in new))

    def _oldest(self, counts: Counter[str], sizes: Counter[str], now: datetime) -> Iterator[StoredResponse]:
        """Yields the scopes of expired responses, and then of responses to remove until `counts` and `sizes` are within
        the limits. The caller subtracts each yielded one from them."""

        def share(project: str) -> float:
            return max(counts[project] / MAX_RESPONSES, sizes[project] / MAX_BYTES)

        for response in self._by_scope.values():
            if not response.is_expired(now):
                break
            yield response
        rest: dict[str, Iterator[StoredResponse]] = {}
        while counts.total() > MAX_RESPONSES or sizes.total() > MAX_BYTES:
            project = max(counts, key=share)
            if project not in rest:
                kept = self._by_project.get(project, {})
                rest[project] = (response for response in kept.values() if not response.is_expired(now))
            oldest = next(rest[project], None)
            if oldest is None:
                break  # Only new ones are left.
            yield oldest

    def replace(self, loaded: Iterable[StoredResponse]) -> None:
        """Take over what was loaded from the database."""
        self._by_scope.clear()
        self._by_project.clear()
        self._sizes.clear()
        self.apply(sorted(loaded, key=lambda response: response.at), ())

    def apply(self, new: Iterable[StoredResponse], dropped: Iterable[bytes]) -> None:
        """Take over what a commit changed."""
        for scope in dropped:
            self._drop(scope)
        for response in new:
            self._drop(response.key.scope)
            project = response.key.project
            self._by_scope[response.key.scope] = response
            self._by_project.setdefault(project, {})[response.key.scope] = response
            self._sizes[project] += response.size

    def _drop(self, scope: bytes) -> None:
        old = self._by_scope.pop(scope, None)
        if old is None:
            return
        project = old.key.project
        self._sizes[project] -= old.size
        del self._by_project[project][scope]
        if not self._by_project[project]:
            del self._by_project[project], self._sizes[project]
