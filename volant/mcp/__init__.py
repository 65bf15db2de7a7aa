"""Volant for models: the Model Context Protocol, and the document's own form of commands."""

from ._route import routes
from ._wire import Command, CommandAnswer, RpcAnswer, RpcMessage

__all__ = ["Command", "CommandAnswer", "RpcAnswer", "RpcMessage", "routes"]
