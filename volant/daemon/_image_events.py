"""Writes events of OCI image fetches into the journal."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import trio

from actors import Ref
from volant.journal import AddImageEvent, Journal, ask_journal
from volant.model import EventType, ImageFacts, Problem

if TYPE_CHECKING:
    from volant.oci import PullEvent

_logger = logging.getLogger("volant.oci")
_WAITING = 1024
"""Maximum events that wait for the journal, more than all concurrent fetches can have. Further ones are lost."""
_TYPES = {
    "started": EventType.IMAGE_PULL_STARTED,
    "progress": EventType.IMAGE_PULL_PROGRESS,
    "done": EventType.IMAGE_PULLED,
    "failed": EventType.IMAGE_PULL_FAILED,
}


class ImageEvents:
    """Accepts events at once, and writes them in order while `keep` runs."""

    def __init__(self, journal: Ref[Journal]) -> None:
        self._journal = journal
        self._put: trio.MemorySendChannel[PullEvent]
        self._put, self._take = trio.open_memory_channel(_WAITING)

    def observe(self, event: PullEvent) -> None:
        """Accepts an event."""
        try:
            self._put.send_nowait(event)
        except trio.WouldBlock:
            _logger.warning("an event of the image %s is lost: the journal is too slow", event.reference)

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Writes events until cancelled. An event that the journal refuses is lost; the fetch is not affected."""
        task_status.started()
        while True:
            event = await self._take.receive()
            facts = ImageFacts(
                reference=event.reference,
                digest=event.digest,
                done_bytes=event.done_bytes,
                total_bytes=event.total_bytes,
                layers_done=event.layers_done,
                layers_total=event.layers_total,
                bytes_per_s=round(event.bytes_per_s),
                code=event.code.replace("_", "-"),
            )
            try:
                await ask_journal(self._journal, AddImageEvent(_TYPES[event.kind], event.project, facts, _text(event)))
            except Problem as problem:
                _logger.warning("an event of the image %s is lost: %s", event.reference, problem)


def _text(event: PullEvent) -> str:
    match event.kind:
        case "started":
            return f"fetching {_mb(event.total_bytes)}"
        case "progress":
            layers = f"{event.layers_done} of {event.layers_total} layers are done"
            return f"{_mb(event.done_bytes)} of {_mb(event.total_bytes)} at {_mb(event.bytes_per_s)}/s, {layers}"
        case "done":
            return "in the cache"
        case "failed":
            return event.message


def _mb(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
