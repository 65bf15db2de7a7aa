"""REST, streams and documents over what the daemon does."""

from ._app import create_app

__all__ = ["create_app"]
