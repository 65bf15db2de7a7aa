"""The answer of a workload to an action."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping

import httpx

from ._calls import read_whole

ACTION_S = 660.0
"""Longer than the daemon's limit for an action, 600 s."""
MAX_ANSWER = 64 * 1024 * 1024


class ActionAnswer:
    """A workload's answer, of any status; `async for` yields its body in pieces, once."""

    def __init__(self, response: httpx.Response, chunks: AsyncIterator[bytes]) -> None:
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = response.headers
        """The headers, by name in any case."""
        self.content_type: str = response.headers.get("Content-Type", "")
        self._chunks = chunks

    @property
    def is_success(self) -> bool:
        """Whether the status is a success."""
        return 200 <= self.status < 300

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._chunks

    async def read(self, limit: int = MAX_ANSWER) -> bytes:
        """Returns the rest of the body. :raises UnexpectedAnswer: it is longer than `limit` bytes."""
        return await read_whole(self._chunks, limit, "the workload's answer")


class Pieces(httpx.AsyncByteStream):
    """The body of a request in pieces. If the request is aborted, the generator is closed."""

    def __init__(self, pieces: AsyncIterable[bytes]) -> None:
        self._pieces = pieces
        self._generators: list[AsyncGenerator[bytes, None]] = []

    def __aiter__(self) -> AsyncIterator[bytes]:
        pieces = aiter(self._pieces)
        if isinstance(pieces, AsyncGenerator):
            self._generators.append(pieces)
        return pieces

    async def aclose(self) -> None:
        for generator in self._generators:
            await generator.aclose()


def is_from_guest(headers: Mapping[str, str]) -> bool:
    """Returns whether an answer comes from a guest: the daemon adds a header to those, which guests can't remove."""
    return "sandbox" in [part.strip() for part in headers.get("content-security-policy", "").split(",")]
