"""`/api/v1/vms`: VMs and what can be asked of them."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from urllib.parse import urlencode

import trio
from quart import Response, request
from quart_trio import QuartTrio

from volant.http import Nothing, Query, empty_response, interruptible, json_response, read_body, read_one_of
from volant.journal import IdempotencyKey, VmChanged, VmCreated, VmForked
from volant.model import (
    Command,
    CommandRequest,
    CreateVm,
    EventId,
    ForkVm,
    Problem,
    RestoreVm,
    Status,
    check_create,
    check_fork,
    check_restore,
    parse_duration,
    view,
)
from volant.model.agent import MAX_GRACE_S
from volant.operations import ApiDeps, chosen, vm_row
from volant.vm import Version

from ._idempotency import Outcome, Repeats
from ._params import etag, if_match, is_not_modified, no_query, query, wait_of
from ._results import respond

_MAX_PAGE = 1000
_DEFAULT_GRACE_S = 10.0


def add_routes(app: QuartTrio, deps: ApiDeps, repeats: Repeats) -> None:
    """The routes of this resource."""

    @app.get("/api/v1/vms")
    async def list_vms() -> Response:
        parameters = query()
        states = parameters.all("status")
        plugins = parameters.names("plugin")
        labels = parameters.labels()
        limit = parameters.integer("limit", minimum=1, maximum=_MAX_PAGE)
        cursor = parameters.integer("cursor")
        parameters.done()
        wanted = _states(parameters, states)
        rows = [row for row in chosen(deps, states=wanted, plugins=plugins, labels=labels) if row.id > (cursor or 0)]
        page = rows if limit is None else rows[:limit]
        response = json_response([view(row) for row in page])
        response.headers["Volant-Event-Id"] = str(deps.store.projection.last_event)
        if len(page) < len(rows):
            response.headers["Link"] = f'<{_next_page(page[-1].id)}>; rel="next"'
        return response

    @app.post("/api/v1/vms")
    async def create_vm() -> Response:
        parameters = query()
        states, timeout_s = wait_of(parameters)
        parameters.done()
        wanted = await read_one_of("from_snapshot", RestoreVm, CreateVm)
        if isinstance(wanted, RestoreVm):
            check_restore(wanted)
        else:
            check_create(wanted)
        since = deps.store.projection.last_event

        async def create(key: IdempotencyKey | None) -> VmCreated:
            if isinstance(wanted, RestoreVm):
                return VmCreated.of(await deps.vms.restore(wanted, key=key))
            return VmCreated.of(await deps.vms.create(wanted, key=key))

        return await after_waiting(await repeats.run(wanted, create), states, timeout_s, since)

    @app.get("/api/v1/vms/<name>")
    async def get_vm(name: str) -> Response:
        row = vm_row(deps, name)
        if not request.query_string:
            if is_not_modified(row):
                response = empty_response(304)
                response.headers["ETag"] = etag(row.id, row.revision)
                return response
            return respond(Outcome(VmChanged.of(row)))
        parameters = query()
        states, timeout_s = wait_of(parameters)
        parameters.done()
        return await after_waiting(Outcome(VmChanged.of(row)), states, timeout_s, deps.store.projection.last_event)

    @app.delete("/api/v1/vms/<name>")
    async def delete_vm(name: str) -> Response:
        no_query()
        await read_body(Nothing)
        name = vm_row(deps, name).name
        only_at = if_match()
        async with interruptible(_stopping()) as waits:
            gone = await waits.until(partial(_deleted, deps, name, only_at))
        if not gone:
            raise Problem(
                503, "daemon-stopping", f"the daemon stops; VM {name!r} goes on being deleted when it is back", vm=name
            )
        return empty_response(204)

    @app.get("/api/v1/vms/<name>/inspect")
    async def inspect_vm(name: str) -> Response:
        no_query()
        return json_response(deps.vms.inspect(vm_row(deps, name).name))

    @app.get("/api/v1/vms/<name>/memory")
    async def vm_memory(name: str) -> Response:
        no_query()
        return json_response(await deps.vms.memory(vm_row(deps, name).name))

    async def apply(name: str, command: Command) -> Response:
        parameters = query()
        states, timeout_s = wait_of(parameters)
        grace_s = _DEFAULT_GRACE_S
        if command in (Command.STOP, Command.RESTART):
            grace_s = _grace(parameters)
        parameters.done()
        await read_body(Nothing)
        wanted = CommandRequest(command, grace_s=grace_s)
        only_at = if_match()
        since = deps.store.projection.last_event

        async def act(key: IdempotencyKey | None) -> VmChanged:
            return VmChanged.of(await deps.vms.apply(vm_row(deps, name).name, wanted, only_at=only_at, key=key))

        return await after_waiting(await repeats.run((wanted, only_at), act), states, timeout_s, since)

    @app.post("/api/v1/vms/<name>/start")
    async def start_vm(name: str) -> Response:
        return await apply(name, Command.START)

    @app.post("/api/v1/vms/<name>/stop")
    async def stop_vm(name: str) -> Response:
        return await apply(name, Command.STOP)

    @app.post("/api/v1/vms/<name>/restart")
    async def restart_vm(name: str) -> Response:
        return await apply(name, Command.RESTART)

    @app.post("/api/v1/vms/<name>/pause")
    async def pause_vm(name: str) -> Response:
        return await apply(name, Command.PAUSE)

    @app.post("/api/v1/vms/<name>/resume")
    async def resume_vm(name: str) -> Response:
        return await apply(name, Command.RESUME)

    @app.post("/api/v1/vms/<name>/recover")
    async def recover_vm(name: str) -> Response:
        return await apply(name, Command.RECOVER)

    @app.post("/api/v1/vms/<name>/fork")
    async def fork_vm(name: str) -> Response:
        parameters = query()
        states, timeout_s = wait_of(parameters)
        parameters.done()
        wanted = await read_body(ForkVm)
        check_fork(wanted)
        since = deps.store.projection.last_event

        async def fork(key: IdempotencyKey | None) -> VmForked:
            return VmForked.of(await deps.vms.fork(vm_row(deps, name).name, wanted, key=key))

        outcome = await repeats.run(wanted, fork)
        if not states:
            return respond(outcome)
        ids = [copy.id for copy in outcome.result.copies]
        outcomes: list[str] = []

        async def wait_for(vm_id: int) -> None:
            outcomes.append((await deps.vms.wait(vm_id, states, timeout_s, since=since))[0])

        async def wait() -> bool:
            async with trio.open_nursery() as nursery:
                for vm_id in ids:
                    nursery.start_soon(wait_for, vm_id)
            return True

        async with interruptible(_stopping()) as waits:
            all_told = await waits.until(wait)
        rows = [row for row in map(deps.store.projection.by_id, ids) if row is not None]
        response = respond(outcome._replace(result=VmForked.of(rows)))
        worst = "failed" if "failed" in outcomes else "timeout" if "timeout" in outcomes or not all_told else "met"
        response.headers["Volant-Wait"] = worst
        return response

    async def after_waiting(
        outcome: Outcome[VmCreated] | Outcome[VmChanged], states: Collection[str], timeout_s: float, since: EventId
    ) -> Response:
        """Returns the response, with the VM as it is after waiting for `states`, also for a repeated request."""
        if not states:
            return respond(outcome)
        result = outcome.result
        # A daemon that stops lets go of those who wait: what it tells is true, and they can ask again.
        wait = partial(deps.vms.wait, result.vm.id, states, timeout_s, since=since)
        async with interruptible(_stopping()) as waits:
            waited, now = await waits.until(wait) or ("timeout", deps.store.projection.by_id(result.vm.id))
        response = respond(Outcome(result if now is None else result.of(now), outcome.replayed))
        response.headers["Volant-Wait"] = waited
        return response


async def _deleted(deps: ApiDeps, name: str, only_at: Collection[Version] | None) -> bool:
    await deps.vms.delete(name, only_at=only_at)
    return True


def _stopping() -> trio.Event:
    stopping: trio.Event = request.scope["state"]["stopping"]
    return stopping


def _states(parameters: Query, given: list[str]) -> frozenset[str]:
    return parameters.words("status", frozenset(str(state) for state in Status)) if given else frozenset()


def _grace(parameters: Query) -> float:
    text = parameters.text("grace")
    return _DEFAULT_GRACE_S if text is None else parse_duration(text, "grace", maximum_s=MAX_GRACE_S)


def _next_page(cursor: int) -> str:
    pairs = [(key, value) for key, value in request.args.items(multi=True) if key != "cursor"]
    return f"/api/v1/vms?{urlencode([*pairs, ('cursor', str(cursor))])}"
