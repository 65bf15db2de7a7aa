"""Volant for models: the Model Context Protocol, and the document's own form of commands."""

from ._commands import Command, CommandAnswer
from ._route import RpcAnswer, RpcMessage, routes
from ._tools import TOOLS

__all__ = ["TOOLS", "Command", "CommandAnswer", "RpcAnswer", "RpcMessage", "routes"]
