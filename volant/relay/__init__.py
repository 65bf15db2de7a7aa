"""To a server inside a guest and back: HTTP, WebSockets and bare bytes, a fair share each."""

from ._headers import SANDBOX
from ._relay import Relay, first_text, open_port, parse_port, to_port, unreachable

__all__ = ["SANDBOX", "Relay", "first_text", "open_port", "parse_port", "to_port", "unreachable"]
