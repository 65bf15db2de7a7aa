"""To a server inside a guest and back: HTTP, WebSockets and bare bytes, a fair share each."""

from ._headers import SANDBOX
from ._relay import Relay, first_text, open_port, parse_port, to_port, unreachable
from ._turns import Turns

__all__ = ["SANDBOX", "Relay", "Turns", "first_text", "open_port", "parse_port", "to_port", "unreachable"]
