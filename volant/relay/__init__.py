"""Relays between clients and servers inside guests: HTTP, WebSockets and plain TCP, with a fair share for each VM."""

from ._headers import SANDBOX
from ._relay import Relay, first_text, open_port, parse_port, to_port, unreachable

__all__ = ["SANDBOX", "Relay", "first_text", "open_port", "parse_port", "to_port", "unreachable"]
