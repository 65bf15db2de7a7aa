"""How much of the daemon's time one guest's frames may take.

Bytes are bounded by flow control; frames are not. A guest can send millions of frames that carry nothing (pings, empty
data, settings), and each costs this side as much as 16 KiB of data does. And what stands in frames that are not data is
parsed entry by entry: 16 KiB of settings take 10 ms. So frames are priced as they come in, before they are parsed: data
pays for its own frame, every other costs by its size, and what is left is a budget that refills with time. A guest that
overspends it is read more slowly, which holds back nobody but itself. Closing the link instead was rejected: a busy but
honest guest with short lines would lose all its streams.
"""

from __future__ import annotations

from volant.concurrency import TokenBucket

from ._errors import LinkLost

FRAME_LIMIT = 16384
"""HTTP/2's default for the longest frame; neither side raises it."""

_HEADER = 9
_DATA = 0
_DATA_BYTES = 2048
"""As much data pays for its frame."""
_OTHER_BYTES = 32
"""As much of anything else costs as much as a frame. Honest ones are about as long."""


class FrameCounter:
    """Follows the frames of a stream of bytes, without looking into them."""

    def __init__(self) -> None:
        self._header = bytearray()
        self._body = 0  # bytes of the current frame still to come

    def take(self, data: bytes, limit: int) -> tuple[int, int, float]:
        """Count frames in `data`, up to `limit` of them: how many bytes that is, how many frames begin there, and what
        they cost.

        Raises LinkLost at a frame longer than `FRAME_LIMIT`, as soon as its header is seen: the HTTP/2 library would
        wait for all of it first, up to 16 MiB.
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
    """Frames a second that need no data to pay for them."""
    return TokenBucket(2500.0, 2500.0)
