"""`/api/v1/system/df` and `/api/v1/system/prune`: what takes space on the host."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast, get_args

from quart import Response
from quart_trio import QuartTrio

from volant.http import Nothing, json_response, read_body
from volant.model import Problem, StoredKind
from volant.operations import ApiDeps
from volant.vm import prune, usage

from ._params import no_query, query

_KINDS: frozenset[str] = frozenset(get_args(StoredKind))


def add_routes(app: QuartTrio, deps: ApiDeps) -> None:
    """The routes of this resource."""

    @app.get("/api/v1/system/df")
    async def df() -> Response:
        no_query()
        with _disk():
            return json_response(await usage(deps.vms.doors))

    @app.post("/api/v1/system/prune")
    async def prune_() -> Response:
        parameters = query()
        dry_run = parameters.flag("dry_run", default=False)
        kinds = cast("frozenset[StoredKind]", parameters.words("kind", _KINDS))
        unused_for_s = parameters.duration("unused_for", 0.0, maximum_s=math.inf)
        parameters.done()
        await read_body(Nothing)
        with _disk():
            return json_response(await prune(deps.vms.doors, kinds or None, dry_run=dry_run, unused_for_s=unused_for_s))


@contextmanager
def _disk() -> Iterator[None]:
    """:raises Problem: 503 instead of OSError."""
    try:
        yield
    except OSError as error:
        raise Problem(
            503, "disk-unreadable", f"what lies on the disk can't be looked at: {error}", hint="look at the disk"
        ) from error
