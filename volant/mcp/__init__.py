"""The API for models: the Model Context Protocol, and the commands of our own form on the same URL."""

from ._commands import Command, CommandAnswer, RpcAnswer, RpcMessage
from ._route import routes
from ._subject import Subjects

__all__ = ["Command", "CommandAnswer", "RpcAnswer", "RpcMessage", "Subjects", "routes"]
