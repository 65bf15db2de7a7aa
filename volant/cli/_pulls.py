"""The progress of an image fetch, shown while a command waits for it."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cache

import trio

from volant.client import Client, ClientError
from volant.concurrency import open_helpers
from volant.model import Problem, PullView

from ._output import Output
from ._progress import drawing
from ._text import safe

_POLL_S = 0.5
_PHASES = {"waiting": "Waiting for", "resolving": "Resolving", "fetching": "Fetching", "converting": "Unpacking"}


@asynccontextmanager
async def showing_pull(client: Client, out: Output, reference: str, digest: str | None = None) -> AsyncIterator[None]:
    """Shows the fetch of an image on standard error while the block runs: a bar on a terminal, otherwise one line.

    :param digest: the image's digest; None to find the fetch by `reference`
    """
    if out.json:
        yield
        return
    with _screen(out, reference) as show:

        async def look() -> None:
            if (pull := find_pull(await client.images.pulls(), reference, digest)) is not None:
                show(pull)

        async with open_helpers() as helpers:
            helpers.start_soon(poll, look)
            yield


async def poll(look: Callable[[], Awaitable[None]]) -> None:
    """Calls `look` repeatedly, until the daemon does not answer."""
    while True:
        try:
            await look()
        except (ClientError, Problem):
            # The progress is optional; the command itself reports errors.
            return
        await trio.sleep(_POLL_S)


def names_of(reference: str) -> set[str]:
    """Returns a reference as a client writes it, and as the daemon writes it."""
    from volant.oci import OciError, parse_reference

    try:
        return {reference, str(parse_reference(reference))}
    except OciError:
        return {reference}


def find_pull(pulls: Sequence[PullView], reference: str, digest: str | None) -> PullView | None:
    """Returns the fetch of an image: by its digest if known, otherwise by the reference in either spelling."""
    names = names_of(reference)
    for pull in pulls:
        if pull.digest == digest if digest is not None and pull.digest is not None else pull.reference in names:
            return pull
    return None


@contextmanager
def _screen(out: Output, reference: str) -> Iterator[Callable[[PullView], None]]:
    """Yields a function that shows the state of a fetch: as a bar, or once as a line if there is no terminal."""
    if sys.stderr.isatty():
        with drawing() as draw:
            yield lambda pull: draw(describe(reference, pull), pull.done_bytes, pull.total_bytes)
    else:
        # Printed once, however often it is shown.
        note = cache(out.note)
        yield lambda pull: note(f"volar: fetching {safe(reference)}")


def describe(reference: str, pull: PullView) -> str:
    """Returns the state of a fetch, for people."""
    layers = (
        f", layer {min(pull.layers_done + 1, pull.layers_total)} of {pull.layers_total}" if pull.layers_total else ""
    )
    return f"{_PHASES.get(pull.phase, 'Fetching')} {safe(reference)}{layers}"
