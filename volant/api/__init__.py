"""The front end: HTTP, WebSockets and server-sent events over what the daemon does."""

from ._app import create_app
from ._doors import ApiSettings, Doors, SystemDoor
from ._limits import Limits
from ._serving import serve

__all__ = ["ApiSettings", "Doors", "Limits", "SystemDoor", "create_app", "serve"]
