"""Any host of a fleet answers for all: requests go to the host that can do them. See docs/explanation/fleet.md."""

from ._app import FromHosts as FromHosts, Handler as Handler
from ._router import Router as Router
