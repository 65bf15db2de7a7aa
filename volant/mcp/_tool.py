"""The declaration of a tool, its call and its result."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar, get_args, get_type_hints
from urllib.parse import quote

import msgspec
import trio
from msgspec import UnsetType

from volant.operations import Context

T = TypeVar("T")
Gives = TypeVar("Gives", bound=msgspec.Struct, covariant=True)

DEFAULT_S = 50.0
"""How long a tool waits by default: many clients give up after a minute."""


Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]
Path = Annotated[str, msgspec.Meta(pattern=r"^/[^\x00]*$", max_length=4096)]


MissingHosts = Annotated[
    list[str] | UnsetType,
    msgspec.Meta(description="Hosts of the fleet that did not answer. Their objects are missing, or as last reported."),
]


class Link(msgspec.Struct, frozen=True):
    """A link to the full content."""

    uri: str
    name: str
    mime_type: str


class Image(msgspec.Struct, frozen=True):
    """An image for the model."""

    data: bytes
    mime_type: str


class Result(Generic[Gives], msgspec.Struct, frozen=True):
    """The result of a tool: its struct, with links and images beside it."""

    value: Gives
    links: tuple[Link, ...] = ()
    images: tuple[Image, ...] = ()
    failed: bool = False
    """Whether the call is reported as an error, though it has a result."""


@dataclass(kw_only=True)
class ToolCall(Context):
    """A call of a tool, with its progress."""

    progress: str = ""
    """The latest progress message; `changed` is set with it."""
    changed: trio.Event = field(default_factory=trio.Event)

    def report(self, text: str) -> None:
        """Sets the progress message, for clients that want progress."""
        self.progress = text
        self.changed.set()

    async def until(self, wait: Callable[[], Awaitable[T]]) -> T:
        """Waits for something that may take long. :raises Problem: 503, the daemon stops."""
        return await self.unless_stopping(wait)


Run = Callable[[ToolCall, Any], Awaitable[Result[Any]]]


class Tool(msgspec.Struct, frozen=True, kw_only=True):
    """One tool."""

    name: str
    title: str
    description: str
    takes: type[msgspec.Struct]
    gives: type[msgspec.Struct]
    run: Run
    operation: str
    """The operation whose permission it needs."""
    read_only: bool = False
    destructive: bool = False
    """Whether it can destroy something."""
    idempotent: bool = False
    """Whether a repeated call has no further effect."""
    open_world: bool = False
    """Whether the effect depends on the guest, which is not trusted."""


def tool(name: str, title: str, description: str, **more: Any) -> Callable[[Run], Tool]:
    """Makes a tool from the decorated function, which takes a call and `wanted`, a struct, and returns a `Result`.

    :param more: members of `Tool`
    """

    def make(run: Run) -> Tool:
        hints = get_type_hints(run)
        (gives,) = get_args(hints["return"])
        return Tool(
            name=name, title=title, description=description, takes=hints["wanted"], gives=gives, run=run, **more
        )

    return make


def log_link(vm: str) -> Link:
    """Returns the link to the log of a VM."""
    return Link(f"{vm_uri(vm)}/logs", f"The log of VM {vm}", "text/plain")


def file_link(vm: str, path: str) -> Link:
    """Returns the link to a file in a VM."""
    return Link(f"{vm_uri(vm)}/files{quote(path)}", f"{path} in VM {vm}", "application/octet-stream")


def vm_uri(vm: str) -> str:
    """Returns the URI of a VM as a resource."""
    return f"volant://vms/{vm}"
