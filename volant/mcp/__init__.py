"""The API for models: the Model Context Protocol, and the commands of our own form on the same URL."""

from ._commands import (
    Command as Command,
    CommandAnswer as CommandAnswer,
    RpcAnswer as RpcAnswer,
    RpcMessage as RpcMessage,
)
from ._route import routes as routes
from ._subject import Subjects as Subjects
