"""AG-UI of all VMs in a fleet: any host tells what happens on all of them."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.api.agui_client import Telling
from tests.fleet.cluster import needs_etcd
from tests.fleet.hosts import NO_BOOT, READY_S, HostOfFleet, fleet, tool
from tests.system.kit import next_event

RUN = {"threadId": "vms", "runId": "1"}


class Following(Telling):
    """A run over HTTP."""

    def __init__(self) -> None:
        super().__init__()
        self.happened: list[str] = []
        self._news = trio.Event()

    async def read(self, response: httpx.Response) -> None:
        async for line in response.aiter_lines():
            if line:
                event = self.take(json.loads(line.removeprefix("data: ")))
                if event["type"] == "CUSTOM":
                    self.happened.append(f"{event['value']['name']} {event['value']['type']}")
                self._news.set()
                self._news = trio.Event()

    async def until(self, holds: Callable[[dict[str, Any]], bool]) -> None:
        """Waits until the state is as wanted, at the end of an event's changes."""
        with trio.move_on_after(READY_S):
            while self.types[-1:] not in (["STATE_SNAPSHOT"], ["CUSTOM"]) or not holds(self.vms):
                await self._news.wait()
            return
        raise AssertionError(f"the state is {self.vms}, after {self.happened}")


@asynccontextmanager
async def following(host: HostOfFleet, query: str = "", **headers: str) -> AsyncIterator[Following]:
    path = f"/api/v1/agui?duration=10m{query}"
    async with host.http() as http, http.stream("POST", path, json=RUN, headers=headers, timeout=READY_S) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        found = Following()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(found.read, response)
            yield found
            nursery.cancel_scope.cancel()


async def make(http: httpx.AsyncClient, host: str, name: str, project: str = "default") -> None:
    made = await http.post(
        f"/api/v1/vms?wait=crashed&project={project}",
        json={"name": name, "memory_mb": 128},
        headers={"Volant-Host": host},
    )
    assert (made.status_code, made.headers["Volant-Wait"]) == (201, "met"), made.text


def crashed(*names: str) -> Callable[[dict[str, Any]], bool]:
    return lambda vms: {name: vm["status"] for name, vm in vms.items()} == dict.fromkeys(names, "crashed")


def shown(vms: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """What events tell of VMs: clearing away what a boot has left changes a VM once more, without an event."""
    return {vm["name"]: vm | {"updated_at": None} for vm in vms}


@pytest.mark.system
@needs_etcd
async def test_any_host_tells_what_happens_on_all(tmp_path: Path) -> None:
    with fleet(tmp_path, "h1", "h2", flags=NO_BOOT) as found:
        await found.cluster.ready()
        await found.up()
        h1, h2 = found.hosts
        async with h1.http() as http:
            await make(http, "h2", "old")
            async with (
                following(h1) as all_of_them,
                following(h1, **{"Volant-Host": "h1"}) as of_h1,
                following(h1, "&project=*") as every_project,
            ):
                await all_of_them.until(crashed("old"))
                await of_h1.until(crashed())
                await every_project.until(crashed("old"))
                await make(http, "h2", "far")
                await make(http, "h1", "near")
                await all_of_them.until(crashed("old", "far", "near"))
                await of_h1.until(crashed("near"))
                listed = (await http.get("/api/v1/vms")).json()
                assert shown(all_of_them.vms.values()) == shown(listed)
                assert all_of_them.happened.count("far VM_CRASHED") == 1
                # And so do the stream of events and the tool of models.
                async with h1.daemon.client() as client, client.events(after="0", types=["VM_CRASHED"]) as feed:
                    events = [await next_event(feed) for _ in range(3)]
                assert {event.name for event in events} == {"old", "far", "near"}
                told = await tool(http, "vms_events", since="0", types=["VM_CREATED"])
                assert {each["name"] for each in told["events"]} == {"old", "far", "near"}
                assert (await http.delete("/api/v1/vms/far")).status_code == 204
                await all_of_them.until(crashed("old", "near"))
                assert (await http.post("/api/v1/projects", json={"name": "web"})).status_code == 201
                await make(http, "h1", "elsewhere", "web")
                await every_project.until(crashed("old", "near", "elsewhere"))
                # A host that is away delays nobody, and what happens there comes when it is back.
                h2.daemon.kill()
                await make(http, "h1", "meanwhile")
                await all_of_them.until(crashed("old", "near", "meanwhile"))
                h2.daemon.start()
                await found.up()
                await make(http, "h2", "again")
                await all_of_them.until(crashed("old", "near", "meanwhile", "again"))
                assert all_of_them.types.count("RUN_STARTED") == 1
                assert "elsewhere" not in all_of_them.vms
