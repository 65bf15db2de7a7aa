"""Stored responses: what requests with an idempotency key were answered, so that a repeated one is not carried out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from datetime import datetime

import msgspec

from volant.model import Problem

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


class StoredResponse(msgspec.Struct, frozen=True):
    """The result of a request. It stays encoded, as it is rarely read and thousands are in memory."""

    key: IdempotencyKey
    at: int
    """Seconds since 1970."""
    encoded: bytes
    """The result as JSON."""

    @classmethod
    def of(cls, key: IdempotencyKey, now: datetime, result: Result) -> StoredResponse:
        return cls(key, int(now.timestamp()), _encode(result))

    @property
    def result(self) -> Result:
        """:raises msgspec.ValidationError: it isn't one, which a database may contain."""
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
    """The stored responses in memory, the oldest first. Everybody may read; only the journal writes, after a commit."""

    def __init__(self) -> None:
        self._by_scope: dict[bytes, StoredResponse] = {}
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._by_scope)

    def find(self, key: IdempotencyKey, now: datetime) -> Result | None:
        """Returns the result of the last 24 hours. :raises Problem: 422 when the key was used for another request."""
        stored = self._by_scope.get(key.scope)
        return None if stored is None or stored.is_expired(now) else stored.result_for(key)

    # For the journal alone

    def surplus(self, new: Collection[StoredResponse], now: datetime) -> list[bytes]:
        """Returns the scopes of the responses that expire, or have to make room for `new`."""
        replaced = {response.key.scope for response in new}
        count = len(self._by_scope) + len(new)
        size = self._bytes + sum(response.size for response in new)
        surplus = []
        for scope, response in self._by_scope.items():
            if count <= MAX_RESPONSES and size <= MAX_BYTES and not response.is_expired(now):
                break
            count -= 1
            size -= response.size
            if scope not in replaced:
                surplus.append(scope)
        return surplus

    def replace(self, loaded: Iterable[StoredResponse]) -> None:
        """Take over what was loaded from the database."""
        self._by_scope.clear()
        self._bytes = 0
        self.apply(sorted(loaded, key=lambda response: response.at), ())

    def apply(self, new: Iterable[StoredResponse], dropped: Iterable[bytes]) -> None:
        """Take over what a commit changed."""
        for scope in dropped:
            self._drop(scope)
        for response in new:
            self._drop(response.key.scope)
            self._by_scope[response.key.scope] = response
            self._bytes += response.size

    def _drop(self, scope: bytes) -> None:
        old = self._by_scope.pop(scope, None)
        if old is not None:
            self._bytes -= old.size
