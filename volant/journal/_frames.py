"""An event, encoded once for everybody who reads it."""

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
    """The whole block of the event stream, blank line and all."""

    @property
    def size(self) -> int:
        """Bytes that it occupies, roughly."""
        return len(self.data) + len(self.sse) + _OVERHEAD

    @classmethod
    def of(cls, seq: int, event: Event) -> EventFrame:
        """Encode an event."""
        return cls._with(seq, event, _encode(event))

    @classmethod
    def read(cls, epoch: str, seq: int, data: bytes) -> EventFrame:
        """From the JSON that was kept. In a restored database it names the epoch of the one that was copied, and now
        there is another. :raises msgspec.ValidationError: it is none of ours."""
        event = _decode(data)
        event_id = f"{epoch}-{seq}"
        # JSON may have line breaks between its parts, and each would begin another field of the stream.
        if event.id != event_id or b"\n" in data or b"\r" in data:
            return cls.of(seq, msgspec.structs.replace(event, id=event_id))
        return cls._with(seq, event, data)

    @classmethod
    def _with(cls, seq: int, event: Event, data: bytes) -> EventFrame:
        # What we encode has no raw line break, so one data line holds it.
        return cls(seq, event, data, f"id: {event.id}\nevent: {event.type}\ndata: ".encode() + data + b"\n\n")


_OVERHEAD = 600
"""The decoded event and the objects round it."""
