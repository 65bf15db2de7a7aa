"""Positions in the events of all hosts, as one text that is opaque to clients.

`*` and the base64 of one entry for each host: its number, the epoch of its journal, and the number of an event in it. A
host takes about 15 characters. A missing host is read from the event of its join on.
"""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Mapping

from volant.model import EventId

from ._membership import MAX_HOSTS

_MARK = "*"
_LETTERS = b"._"
"""Replacements of `+` and `/`. The text can't be the id of an event of one host, which has a dash."""
MAX_TEXT = 32 * MAX_HOSTS
_MAX_EPOCH = 60
_TEXT = 0x80
"""Added to the length of an epoch that is not an even number of hexadecimal digits."""

Positions = Mapping[int, EventId]
"""Positions by the numbers of hosts. An empty epoch means the oldest event."""


def position_text(positions: Positions) -> str:
    """Returns the text."""
    data = b"".join(entry(*one) for one in sorted(positions.items()))
    return _MARK + b64encode(data, _LETTERS).decode("ascii").rstrip("=")


def entry(number: int, position: EventId) -> bytes:
    """Returns the entry of one host."""
    epoch, text = _packed(position.epoch)
    return b"%b%c%b%b" % (_varint(number), len(epoch) | (_TEXT if text else 0), epoch, _varint(position.seq))


def positions_in(text: str) -> dict[int, EventId] | None:
    """Returns the positions in a text; None if it has none."""
    if not text.startswith(_MARK) or len(text) > MAX_TEXT:
        return None
    try:
        data = b64decode(text[1:] + "=" * (-(len(text) - 1) % 4), _LETTERS, validate=True)
        found: dict[int, EventId] = {}
        place = 0
        while place < len(data):
            number, place = _read_varint(data, place)
            length, raw = data[place] & ~_TEXT, data[place + 1 : place + 1 + (data[place] & ~_TEXT)]
            epoch = raw.decode("ascii") if data[place] & _TEXT else raw.hex()
            # It goes into a header, for the host whose epoch it is.
            if len(raw) < length or not 0 < number <= MAX_HOSTS or not epoch.isprintable():
                return None
            seq, place = _read_varint(data, place + 1 + length)
            found[number] = EventId(epoch, seq)
    except (binascii.Error, IndexError, UnicodeDecodeError, ValueError):
        return None
    return found


def _packed(epoch: str) -> tuple[bytes, bool]:
    try:
        packed = bytes.fromhex(epoch)
        if packed.hex() == epoch:
            return packed, False
    except ValueError:
        pass
    return epoch.encode("ascii")[:_MAX_EPOCH], True


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, place: int) -> tuple[int, int]:
    """Reads a varint. :raises IndexError: it is truncated. :raises ValueError: it is too large."""
    value = shift = 0
    while True:
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
        if shift > 63:
            raise ValueError("too large")
