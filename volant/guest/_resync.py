"""How the guest finds the start of HTTP/2 on a port that is not a connection: see `_mux`."""

from __future__ import annotations

from volant.model.agent import RESYNC_MAGIC, RESYNC_NONCE_BYTES

FRAME = 16384
"""HTTP/2's default for the longest frame, which neither side raises."""
RESYNC_ZEROS = FRAME + 2 * 9
"""Completes the longest frame, a partial header behind it, and one more header."""

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_NO_NONCE = bytes(RESYNC_NONCE_BYTES)
HELLO = bytes(RESYNC_ZEROS) + RESYNC_MAGIC + _NO_NONCE
"""Sent by an agent that starts or has lost sync."""


class Hunt:
    """Looks for the host's magic and nonce and, once they were answered, for the start of HTTP/2."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._nonce = b""  # answered last; empty: none since the link was lost

    def begin(self) -> None:
        """Begins anew, as the link is lost."""
        self._data.clear()
        self._nonce = b""

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """Takes what has arrived. Returns what to send back, and all from the start of HTTP/2 on: empty before it."""
        self._data += data
        answers = b""
        while True:
            magic = self._data.find(RESYNC_MAGIC)
            start = self._data.find(_PREFACE) if self._nonce else -1
            if start >= 0 and (magic < 0 or start < magic):
                rest = bytes(self._data[start:])
                self._data.clear()
                return answers, rest
            if magic < 0:
                # Either may have come in part.
                del self._data[: max(0, len(self._data) - max(len(RESYNC_MAGIC), len(_PREFACE)) + 1)]
                return answers, b""
            after = magic + len(RESYNC_MAGIC)
            nonce = bytes(self._data[after : after + RESYNC_NONCE_BYTES])
            if len(nonce) < RESYNC_NONCE_BYTES:
                del self._data[:magic]
                return answers, b""
            del self._data[: after + RESYNC_NONCE_BYTES]
            # A repeated nonce has its answer already.
            if nonce not in (_NO_NONCE, self._nonce):
                self._nonce = nonce
                answers += nonce
