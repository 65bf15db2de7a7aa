"""The progress of a snapshot's transfer to or from a registry."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from volant.client import Client
from volant.concurrency import open_helpers
from volant.model import TransferView

from ._output import Output
from ._progress import drawing
from ._pulls import names_of, poll
from ._text import safe

_PHASES = {"waiting": "Waiting for", "preparing": "Preparing", "finishing": "Finishing"}


@asynccontextmanager
async def showing_transfer(client: Client, out: Output, kind: str, reference: str) -> AsyncIterator[None]:
    """Shows a transfer on standard error while the block runs: a bar on a terminal, otherwise nothing.

    :param kind: `push` or `pull`
    """
    if out.json or not sys.stderr.isatty():
        yield
        return
    with drawing() as draw:

        async def look() -> None:
            transfer = find_transfer(await client.snapshots.transfers(), kind, reference)
            if transfer is not None:
                draw(describe(transfer), transfer.done_bytes, transfer.total_bytes)

        async with open_helpers() as helpers:
            helpers.start_soon(poll, look)
            yield


def find_transfer(transfers: Sequence[TransferView], kind: str, reference: str) -> TransferView | None:
    """Returns the transfer for a reference in any spelling."""
    names = names_of(reference)
    return next((each for each in transfers if each.kind == kind and each.reference in names), None)


def describe(transfer: TransferView) -> str:
    """Returns the state of a transfer, for people."""
    moving = "Pushing" if transfer.kind == "push" else "Pulling"
    return f"{_PHASES.get(transfer.phase, moving)} {safe(transfer.reference)}"
