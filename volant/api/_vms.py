"""`/api/v1/vms`: VMs and what can be asked of them."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from urllib.parse import quote, urlencode

import trio
from quart import Response, request
from quart_trio import QuartTrio

from volant.model import (
    CreateVm,
    EventId,
    Problem,
    Status,
    Verb,
    VerbKind,
    VmRow,
    check_create,
    parse_duration,
    view,
)
from volant.model.agent import MAX_GRACE_S
from volant.vm import Version

from ._body import Nothing, read_body
from ._doors import Doors
from ._json import empty_response, json_response
from ._params import etag, if_match, is_not_modified, no_query, query, vm_row, wait_of
from ._query import Query
from ._waits import interruptible

_MAX_PAGE = 1000
_DEFAULT_GRACE_S = 10.0


def add_routes(app: QuartTrio, doors: Doors) -> None:
    """The routes of this resource."""

    @app.get("/api/v1/vms")
    async def list_vms() -> Response:
        parameters = query()
        states = parameters.all("status")
        plugins = parameters.all("plugin")
        labels = parameters.labels().items()
        limit = parameters.integer("limit", minimum=1, maximum=_MAX_PAGE)
        cursor = parameters.integer("cursor")
        parameters.done()
        wanted = _states(parameters, states)
        rows = [
            row
            for row in doors.store.projection.rows()
            if (not wanted or row.status in wanted)
            and (not plugins or row.plugin in plugins)
            and (not labels or labels <= row.labels.items())
            and row.id > (cursor or 0)
        ]
        page = rows if limit is None else rows[:limit]
        response = json_response([view(row) for row in page])
        response.headers["Volant-Event-Id"] = str(doors.store.projection.last_event)
        if len(page) < len(rows):
            response.headers["Link"] = f'<{_next_page(page[-1].id)}>; rel="next"'
        return response

    @app.post("/api/v1/vms")
    async def create_vm() -> Response:
        parameters = query()
        states, timeout_s = wait_of(parameters)
        parameters.done()
        wanted = await read_body(CreateVm)
        check_create(wanted)
        since = doors.store.projection.last_event
        row = await doors.vms.create(wanted)
        response = await answer(row, states, timeout_s, since, status=201)
        response.headers["Location"] = f"/api/v1/vms/{quote(row.name)}"
        return response

    @app.get("/api/v1/vms/<name>")
    async def get_vm(name: str) -> Response:
        row = vm_row(doors, name)
        if not request.query_string:
            if is_not_modified(row):
                response = empty_response(304)
                response.headers["ETag"] = etag(row)
                return response
            return _shown(row)
        parameters = query()
        states, timeout_s = wait_of(parameters)
        parameters.done()
        return await answer(row, states, timeout_s, doors.store.projection.last_event)

    @app.delete("/api/v1/vms/<name>")
    async def delete_vm(name: str) -> Response:
        no_query()
        await read_body(Nothing)
        name = vm_row(doors, name).name
        only_at = if_match()
        async with interruptible(_stopping()) as waits:
            gone = await waits.until(partial(_deleted, doors, name, only_at))
        if not gone:
            raise Problem(
                503, "daemon-stopping", f"the daemon stops; VM {name!r} goes on being deleted when it is back", vm=name
            )
        return empty_response(204)

    @app.get("/api/v1/vms/<name>/inspect")
    async def inspect_vm(name: str) -> Response:
        no_query()
        return json_response(doors.vms.inspect(vm_row(doors, name).name))

    async def verb(name: str, kind: VerbKind) -> Response:
        parameters = query()
        states, timeout_s = wait_of(parameters)
        grace_s = _DEFAULT_GRACE_S
        if kind in (VerbKind.STOP, VerbKind.RESTART):
            grace_s = _grace(parameters)
        parameters.done()
        await read_body(Nothing)
        name = vm_row(doors, name).name
        since = doors.store.projection.last_event
        row = await doors.vms.verb(name, Verb(kind, grace_s=grace_s), only_at=if_match())
        return await answer(row, states, timeout_s, since)

    @app.post("/api/v1/vms/<name>/start")
    async def start_vm(name: str) -> Response:
        return await verb(name, VerbKind.START)

    @app.post("/api/v1/vms/<name>/stop")
    async def stop_vm(name: str) -> Response:
        return await verb(name, VerbKind.STOP)

    @app.post("/api/v1/vms/<name>/restart")
    async def restart_vm(name: str) -> Response:
        return await verb(name, VerbKind.RESTART)

    @app.post("/api/v1/vms/<name>/recover")
    async def recover_vm(name: str) -> Response:
        return await verb(name, VerbKind.RECOVER)

    async def answer(
        row: VmRow, states: Collection[str], timeout_s: float, since: EventId, *, status: int = 200
    ) -> Response:
        """The VM as it is after waiting, if that was asked for."""
        if not states:
            return _shown(row, status)
        # A daemon that stops lets go of those who wait: what it tells is true, and they can ask again.
        wait = partial(doors.vms.wait, row.id, states, timeout_s, since=since)
        async with interruptible(_stopping()) as waits:
            outcome, now = await waits.until(wait) or ("timeout", doors.store.projection.by_id(row.id))
        response = _shown(now or row, status)
        response.headers["Volant-Wait"] = outcome
        return response


async def _deleted(doors: Doors, name: str, only_at: Collection[Version] | None) -> bool:
    await doors.vms.delete(name, only_at=only_at)
    return True


def _stopping() -> trio.Event:
    stopping: trio.Event = request.scope["state"]["stopping"]
    return stopping


def _shown(row: VmRow, status: int = 200) -> Response:
    response = json_response(view(row), status)
    response.headers["ETag"] = etag(row)
    return response


def _states(parameters: Query, given: list[str]) -> frozenset[str]:
    return parameters.words("status", frozenset(str(state) for state in Status)) if given else frozenset()


def _grace(parameters: Query) -> float:
    text = parameters.text("grace")
    return _DEFAULT_GRACE_S if text is None else parse_duration(text, "grace", maximum_s=MAX_GRACE_S)


def _next_page(cursor: int) -> str:
    pairs = [(key, value) for key, value in request.args.items(multi=True) if key != "cursor"]
    return f"/api/v1/vms?{urlencode([*pairs, ('cursor', str(cursor))])}"
