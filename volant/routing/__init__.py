"""Routes requests in a fleet: any host accepts all requests and passes them on to the responsible host. See
docs/explanation/fleet.md."""

from ._app import FromHosts as FromHosts, Handler as Handler
from ._router import Router as Router
