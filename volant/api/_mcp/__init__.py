"""Volant for models: the Model Context Protocol, and the document's own form of commands."""

from ._route import routes

__all__ = ["routes"]
