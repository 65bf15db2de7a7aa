"""The front end: HTTP, WebSockets and server-sent events over what the daemon does."""

from ._access import Access
from ._app import create_app
from ._doors import ApiSettings, Doors, SystemDoor
from ._limits import Limits
from ._networks import Network, parse_network
from ._serving import serve

__all__ = [
    "Access",
    "ApiSettings",
    "Doors",
    "Limits",
    "Network",
    "SystemDoor",
    "create_app",
    "parse_network",
    "serve",
]
