"""A rate limit for the HTTP/2 frames of one guest.

Flow control bounds bytes, not frames. A guest can send millions of frames without data (pings, empty data, settings),
each of which costs the daemon as much time as 16 KiB of data; 16 KiB of settings take 10 ms to parse. So each frame has
a price before it is parsed: data pays for its own frame, other frames cost by their size. A guest that exceeds its
budget is read more slowly, which only delays itself. Rejected: closing the link, as a busy honest guest with short
lines would lose all its streams.
"""

from __future__ import annotations

from volant.concurrency import TokenBucket

from ._stream import LinkLost

FRAME_LIMIT = 16384
"""HTTP/2's default for the longest frame, which neither side raises."""

_HEADER = 9
_DATA = 0
_DATA_BYTES = 2048
"""The bytes of data that pay for their frame."""
_OTHER_BYTES = 32
"""The bytes of another frame that cost as much as the frame itself. Honest frames have about as many."""


class FrameCounter:
    """Counts the frames of a stream of bytes by their headers."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._body = 0  # bytes of the current frame still to come

    def take(self, data: bytes, limit: int) -> tuple[int, int, float]:
        """Counts up to `limit` frames in `data`; returns their bytes, the number that begin there, and their price.

        :raises LinkLost: a header announces more than `FRAME_LIMIT` bytes; h2 would first wait for all of them, up to
            16 MiB
        """
        position = 0
        frames = 0
        price = 0.0
        while position < len(data):
            if self._body:
                step = min(self._body, len(data) - position)
                self._body -= step
                position += step
                continue
            if not self._header and frames >= limit:
                break
            step = min(_HEADER - len(self._header), len(data) - position)
            self._header += data[position : position + step]
            position += step
            if len(self._header) == _HEADER:
                self._body = int.from_bytes(self._header[:3], "big")
                is_data = self._header[3] == _DATA
                self._header.clear()
                frames += 1
                price += 1 - self._body / _DATA_BYTES if is_data else 1 + self._body / _OTHER_BYTES
                if self._body > FRAME_LIMIT:
                    raise LinkLost(f"the guest sent a frame of {self._body} bytes")
        return position, frames, price


def frame_budget() -> TokenBucket:
    """Returns the budget: 2,500 frames per second without data."""
    return TokenBucket(2500.0, 2500.0)
