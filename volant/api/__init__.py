"""The HTTP API: REST, streams, and their documents."""

from ._app import create_app as create_app
