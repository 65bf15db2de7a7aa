"""Relays between clients and servers inside guests: HTTP, WebSockets and plain TCP, with a fair share for each VM."""

from ._headers import SANDBOX, end_to_end
from ._redirect import GuestServer, OwnOrigin, unreachable
from ._relay import Relay, first_text, open_port, parse_port, to_port

__all__ = [
    "SANDBOX",
    "GuestServer",
    "OwnOrigin",
    "Relay",
    "end_to_end",
    "first_text",
    "open_port",
    "parse_port",
    "to_port",
    "unreachable",
]
