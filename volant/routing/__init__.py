"""Any host of a fleet answers for all: requests go to the host that can do them. See docs/explanation/fleet.md."""

from ._app import FromHosts, Handler
from ._router import Router

__all__ = ["FromHosts", "Handler", "Router"]
