"""What a tool is, and what it is given and gives."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import msgspec
import trio

from volant.http import interruptible
from volant.model import Problem
from volant.operations import ApiDeps

T = TypeVar("T")

DEFAULT_S = 50.0
"""How long a tool waits unless it is told: many clients give up after a minute."""


Seconds = Annotated[float, msgspec.Meta(gt=0, le=600)]
Path = Annotated[str, msgspec.Meta(pattern=r"^/[^\x00]*$", max_length=4096)]


@dataclass(frozen=True)
class Link:
    """Where the whole of something is."""

    uri: str
    name: str
    mime_type: str


@dataclass(frozen=True)
class Image:
    """A picture for the model to look at."""

    data: bytes
    mime_type: str


@dataclass(frozen=True)
class Result:
    """What a tool gives: its struct, and what goes beside it."""

    value: msgspec.Struct
    links: tuple[Link, ...] = ()
    images: tuple[Image, ...] = ()
    failed: bool = False
    """It was done, and what came of it is a failure."""


class Asked:
    """A call under way: the deps, the daemon's stop, and somebody who wants to hear how far it is."""

    def __init__(self, deps: ApiDeps, stopping: trio.Event) -> None:
        self.deps = deps
        self._stopping = stopping
        self.news = trio.Event()
        self.told = ""
        """What there is to say of its progress; `news` is set when it changes."""

    def tell(self, text: str) -> None:
        """Let the client know how far it is."""
        self.told = text
        self.news.set()

    async def until(self, wait: Callable[[], Awaitable[T]]) -> T:
        """Wait for something that may take long. :raises Problem: 503 the daemon stops."""
        done: list[T] = []

        async def run() -> None:
            done.append(await wait())

        async with interruptible(self._stopping) as waits:
            await waits.until(run)
        if not done:
            raise Problem(503, "daemon-stopping", "the daemon stops", hint="call again when it is back")
        return done[0]


@dataclass(frozen=True, kw_only=True)
class Tool:
    """One tool."""

    name: str
    title: str
    description: str
    takes: type[msgspec.Struct]
    gives: type[msgspec.Struct]
    run: Callable[[Asked, Any], Awaitable[Result]]
    read_only: bool = False
    destructive: bool = False
    """Whether it can lose something that was there."""
    idempotent: bool = False
    """Whether doing it twice does no more than doing it once."""
    open_world: bool = False
    """Whether what happens is up to a guest, which may do anything."""


def log_link(vm: str) -> Link:
    """Where the log of a VM is."""
    return Link(f"{vm_uri(vm)}/logs", f"The log of VM {vm}", "text/plain")


def file_link(vm: str, path: str) -> Link:
    """Where a file in a VM is."""
    return Link(f"{vm_uri(vm)}/files{quote(path)}", f"{path} in VM {vm}", "application/octet-stream")


def vm_uri(vm: str) -> str:
    """Names a VM as a resource."""
    return f"volant://vms/{vm}"
