"""The API for models: the Model Context Protocol, and the commands of our own form on the same URL."""

from ._route import routes
from ._subject import Subjects
from ._wire import Command, CommandAnswer, RpcAnswer, RpcMessage

__all__ = ["Command", "CommandAnswer", "RpcAnswer", "RpcMessage", "Subjects", "routes"]
