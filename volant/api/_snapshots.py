"""`/api/v1/snapshots`, and those of a VM: copies of guests that are kept."""

from __future__ import annotations

from collections.abc import Iterable

from quart import Response
from quart_trio import QuartTrio

from volant.http import Nothing, empty_response, json_response, read_body
from volant.journal import IdempotencyKey, SnapshotTaken
from volant.model import Snapshot, TakeSnapshot, check_take, no_such_snapshot, snapshot_view
from volant.operations import ApiDeps, vm_row

from ._idempotency import Repeats
from ._params import no_query
from ._results import respond


def add_routes(app: QuartTrio, deps: ApiDeps, repeats: Repeats) -> None:
    """The routes of this resource."""

    @app.post("/api/v1/vms/<name>/snapshots")
    async def take_snapshot(name: str) -> Response:
        no_query()
        wanted = await read_body(TakeSnapshot)
        check_take(wanted)

        async def take(key: IdempotencyKey | None) -> SnapshotTaken:
            return SnapshotTaken.of(await deps.vms.take_snapshot(vm_row(deps, name).name, wanted, key=key))

        return respond(await repeats.run(wanted, take))

    @app.get("/api/v1/vms/<name>/snapshots")
    async def list_snapshots_of_vm(name: str) -> Response:
        no_query()
        vm_id = vm_row(deps, name).id
        return _list(one for one in deps.store.projection.snapshots.values() if one.vm.id == vm_id)

    @app.get("/api/v1/snapshots")
    async def list_snapshots() -> Response:
        no_query()
        return _list(deps.store.projection.snapshots.values())

    @app.get("/api/v1/snapshots/<snapshot>")
    async def get_snapshot(snapshot: str) -> Response:
        no_query()
        found = deps.store.projection.snapshots.get(snapshot)
        if found is None:
            raise no_such_snapshot(snapshot)
        return json_response(snapshot_view(found))

    @app.delete("/api/v1/snapshots/<snapshot>")
    async def remove_snapshot(snapshot: str) -> Response:
        no_query()
        await read_body(Nothing)
        await deps.vms.remove_snapshot(snapshot)
        return empty_response(204)


def _list(snapshots: Iterable[Snapshot]) -> Response:
    return json_response([snapshot_view(one) for one in sorted(snapshots, key=lambda one: (one.created_at, one.name))])
