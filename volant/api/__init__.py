"""The front end: HTTP, WebSockets and server-sent events over what the daemon does."""

from ._app import create_app
from ._doors import Doors, SystemDoor
from ._edge import Access, ApiSettings, Limits, Network, parse_network, serve

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
