"""An event, encoded once for all readers."""

from __future__ import annotations

import msgspec

from volant.model import Event

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Event).decode


class EventFrame(msgspec.Struct, frozen=True):
    """An event with its bytes. `event` has what filters need: name, type, labels, vm_id."""

    seq: int
    event: Event
    data: bytes
    """JSON of the event."""
    sse: bytes
    """The block of the event stream, with its blank line."""

    @property
    def size(self) -> int:
        """The bytes that it occupies, roughly."""
        return len(self.data) + len(self.sse) + _OVERHEAD

    @classmethod
    def of(cls, seq: int, event: Event) -> EventFrame:
        """Encode an event."""
        return cls._with(seq, event, _encode(event))

    @classmethod
    def read(cls, epoch: str, seq: int, data: bytes) -> EventFrame:
        """Reads stored JSON. In a restored database it still has the old epoch.

        :raises msgspec.ValidationError: it is no event.
        """
        event = _decode(data)
        event_id = f"{epoch}-{seq}"
        # A line break in the JSON would begin another field of the stream.
        if event.id != event_id or b"\n" in data or b"\r" in data:
            return cls.of(seq, msgspec.structs.replace(event, id=event_id))
        return cls._with(seq, event, data)

    @classmethod
    def _with(cls, seq: int, event: Event, data: bytes) -> EventFrame:
        # What we encode has no raw line break, so one data line holds it.
        return cls(seq, event, data, f"id: {event.id}\nevent: {event.type}\ndata: ".encode() + data + b"\n\n")


_OVERHEAD = 600
"""The decoded event and the objects round it."""
