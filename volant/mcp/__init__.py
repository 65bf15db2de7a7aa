"""The API for models: the Model Context Protocol, and the API's own commands at the same URL."""

from ._commands import (
    Command as Command,
    CommandAnswer as CommandAnswer,
    RpcAnswer as RpcAnswer,
    RpcMessage as RpcMessage,
)
from ._route import routes as routes
from ._subject import Subjects as Subjects
