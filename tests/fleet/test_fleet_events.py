"""The event stream of a fleet: all hosts' events, from any host, without a hole and without a double."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from tests.fleet.cluster import needs_etcd
from tests.fleet.hosts import NO_BOOT, READY_S, FleetOfHosts, HostOfFleet, fleet, tool

pytestmark = [pytest.mark.system, needs_etcd]

PATH = "/api/v1/events/vms"
NAMES = ("b0", "b1", "c0", "c1", "d0", "d1")


class Stream:
    """What a client has got from a stream."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.last_id = ""
        self.got: list[dict[str, Any]] = []
        self._news = trio.Event()

    async def read(self) -> None:
        fields: dict[str, str] = {}
        async for line in self.response.aiter_lines():
            name, _, value = line.partition(": ")
            fields[name] = value
            if not line:
                self.last_id = fields.get("id", self.last_id)
                if "data" in fields:
                    self.got.append(msgspec.json.decode(fields["data"]))
                fields = {}
                self._news.set()
                self._news = trio.Event()

    async def until(self, holds: Callable[[list[dict[str, Any]]], bool]) -> None:
        with trio.move_on_after(READY_S):
            while not holds(self.got):
                await self._news.wait()
            return
        raise AssertionError(f"the stream has {[(each['type'], each.get('name')) for each in self.got]}")

    async def has(self, *vms: str) -> None:
        """Waits until it has the last event of the boot of each of these VMs."""
        wanted = Counter(vms)
        await self.until(lambda got: Counter(each["name"] for each in got if each["type"] == "VM_CRASHED") >= wanted)

    @property
    def gaps(self) -> list[dict[str, Any]]:
        return [each for each in self.got if each["type"] == "STREAM_GAP"]

    @property
    def ids(self) -> list[str]:
        return [each["id"] for each in self.got if each["type"] != "STREAM_GAP"]


@asynccontextmanager
async def stream(host: HostOfFleet, after: str = "", query: str = "", **headers: str) -> AsyncIterator[Stream]:
    if after:
        headers["Last-Event-ID"] = after
    async with host.http() as http, http.stream("GET", PATH + query, headers=headers, timeout=READY_S) as response:
        assert response.status_code == 200, (await response.aread()).decode()
        found = Stream(response)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(found.read)
            yield found
            nursery.cancel_scope.cancel()


async def make(host: HostOfFleet, name: str, labels: Mapping[str, str] | None = None) -> None:
    """Makes a VM on a host, which crashes at once."""
    async with host.http() as http:
        body = {"name": name, "memory_mb": 128, "labels": labels or {}}
        made = await http.post("/api/v1/vms?wait=crashed", json=body, headers={"Volant-Host": host.name})
        assert (made.status_code, made.headers["Volant-Wait"]) == (201, "met"), made.text


async def events_of(host: HostOfFleet, newest: str) -> list[str]:
    """Returns the ids of the events of one host that are kept, up to one."""
    async with stream(host, query="?since=0", **{"Volant-Host": host.name}) as own:
        await own.until(lambda got: any(each["id"] == newest for each in got))
        return own.ids


async def check(found: FleetOfHosts, seen: list[str]) -> None:
    """Checks that ids have no hole and no double, and each host's are in order."""
    assert [name for name, count in Counter(seen).items() if count > 1] == []
    epochs = {each.partition("-")[0] for each in seen}
    for host in found.hosts:
        async with stream(host, **{"Volant-Host": host.name}) as own:
            epoch = own.response.headers["Volant-Event-Id"].partition("-")[0]
        got = [each for each in seen if each.startswith(f"{epoch}-")]
        epochs.discard(epoch)
        if got:
            every = await events_of(host, got[-1])
            begin = every.index(got[0])
            assert got == every[begin : begin + len(got)]
    assert not epochs


@pytest.mark.full
async def test_a_stream_is_continued_at_another_host(tmp_path: Path) -> None:
    with fleet(tmp_path, "h1", "h2", "h3", "h4", flags=NO_BOOT, late=("h4",)) as found:
        await found.cluster.ready()
        h1, h2, h3, h4 = found.hosts
        await found.up("h1", "h2", "h3")
        async with stream(h1) as first:
            # It begins with what happens from now on, on any host.
            for number, host in enumerate((h1, h2, h3, h2)):
                await make(host, f"a{number}", {"n": str(number)})
            await first.has("a0", "a1", "a2", "a3")
            # Without a word to the client.
            h1.daemon.kill()
        assert not first.gaps
        await make(h2, "b0")
        await make(h3, "b1")
        async with stream(h2, first.last_id) as second:
            await second.has("b0", "b1")
            # A host that joins is in the stream, and one that is back is again.
            h4.daemon.start()
            h1.daemon.start()
            await found.up()
            await make(h4, "c0")
            await make(h1, "c1")
            await second.has("c0", "c1")
            # A host that can't be reached delays nobody, and nothing of it is lost.
            assert h3.daemon.process is not None
            h3.daemon.process.send_signal(signal.SIGSTOP)
            async with stream(h4, second.last_id) as third:
                await make(h1, "d0")
                await second.has("d0")
                await third.has("d0")
                h3.daemon.process.send_signal(signal.SIGCONT)
                await found.up()
                await make(h3, "d1")
                await second.has("d1")
                await third.has("d1")
        assert not second.gaps
        assert not third.gaps
        await check(found, first.ids + second.ids)
        assert third.ids == second.ids[-len(third.ids) :]

        async with stream(h3, query="?since=0") as everything:
            await everything.has("a0", "a1", "a2", "a3", *NAMES)
        await check(found, everything.ids)
        async with stream(h4, query="?since=0&vm=a2&types=VM_CREATED,VM_CRASHED") as of_vm:
            await of_vm.has("a2")
        assert [(each["type"], each["name"]) for each in of_vm.got] == [("VM_CREATED", "a2"), ("VM_CRASHED", "a2")]
        async with stream(h4, query="?since=0&label=n=3") as labeled:
            await labeled.has("a3")
        assert {each["name"] for each in labeled.got} == {"a3"}
        async with h4.http() as http:
            page = await tool(http, "vms_events", since="0", types=["VM_CREATED"], limit=4)
            more = await tool(http, "vms_events", since=page["next"], types=["VM_CREATED"])
            both = [each["name"] for each in page["events"] + more["events"]]
            assert (len(page["events"]), sorted(both)) == (4, sorted([*(f"a{n}" for n in range(4)), *NAMES]))
            newest = await tool(http, "vms_events", types=["VM_CREATED"])
            assert [each["name"] for each in newest["events"]][-2:] == ["d0", "d1"]
            assert (await tool(http, "vms_events", since=newest["next"]))["events"] == []
        # The list says where to continue.
        listed = ""
        async with h1.http() as http:
            for number, path in enumerate(("/api/v1/vms", "/api/v1/vms?limit=1")):
                listed = (await http.get(path)).headers["Volant-Event-Id"]
                async with stream(h2, listed) as after:
                    await make(h3, f"e{number}")
                    await after.has(f"e{number}")
                assert not after.gaps

        # A journal that does not continue is a gap.
        async with h3.http() as http:
            for vm in (await http.get("/api/v1/vms", headers={"Volant-Host": "h3"})).json():
                assert (await http.delete(f"/api/v1/vms/{vm['name']}")).status_code == 204
        h3.daemon.kill()
        for file in h3.daemon.state_dir.glob("volant.db*"):
            file.unlink()
        async with stream(h2, listed) as cut:
            h3.daemon.start()
            await found.up()
            await make(h3, "f0")
            await cut.has("f0")
        assert len(cut.gaps) == 1
        async with h2.http() as http:
            refused = await http.get(f"{PATH}?on_gap=410", headers={"Last-Event-ID": listed})
            assert (refused.status_code, refused.json()["type"]) == (410, "urn:volant:error:events-gone")
