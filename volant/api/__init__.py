"""The HTTP API: REST, streams, and their documents."""

from ._app import create_app

__all__ = ["create_app"]
