"""A parser of server-sent events, as the HTML standard defines them, with a limit on their size."""

from __future__ import annotations

import codecs
from dataclasses import dataclass

_MAX_BLOCK = 4 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Message:
    """One block of the stream. `data` is None in a block that only moves the id."""

    event: str
    data: str | None
    last_event_id: str


class SseParser:
    """Parses chunks of a stream into messages. An incomplete message at the end of the stream is dropped.

    :ivar retry_s: the delay before a reconnect that the server has requested, or None
    """

    def __init__(self, last_event_id: str = "") -> None:
        self.retry_s: float | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("replace")
        self._text = ""
        self._size = 0
        self._after_cr = False
        self._event = ""
        self._data: list[str] = []
        self._id = last_event_id
        self._id_moved = False

    def feed(self, chunk: bytes) -> list[Message]:
        """Returns the messages that `chunk` completes.

        :raises ValueError: a block is larger than 4 MiB.
        """
        text = self._decoder.decode(chunk)
        if self._after_cr and text:
            text = text.removeprefix("\n")
            self._after_cr = False
        if text.endswith("\r"):
            self._after_cr = True
        *lines, self._text = (self._text + text).replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._size += len(chunk)
        if self._size > _MAX_BLOCK:
            raise ValueError("an event of the stream is larger than 4 MiB")
        messages = []
        for line in lines:
            if line:
                self._take(line)
                continue
            self._size = len(self._text)
            if self._data or self._id_moved:
                data = "\n".join(self._data) if self._data else None
                messages.append(Message(self._event or "message", data, self._id))
            self._event, self._data, self._id_moved = "", [], False
        return messages

    def _take(self, line: str) -> None:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id" and "\0" not in value:
            self._id, self._id_moved = value, True
        elif name == "retry" and value.isascii() and value.isdecimal() and len(value) < 10:
            self.retry_s = int(value) / 1000
