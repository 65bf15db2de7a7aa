"""Lists of a fleet: those of all hosts together, and what they say of hosts that don't answer."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import httpx
import pytest
import trio

from tests.fleet.cluster import needs_etcd
from tests.fleet.hosts import NO_BOOT, READY_S, FleetOfHosts, fleet, tool
from volant.fleet import open_etcd

pytestmark = [pytest.mark.system, needs_etcd]


def on(host: str) -> dict[str, str]:
    return {"Volant-Host": host}


def names(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [each["name"] for each in answer.json()]


async def in_etcd(found: FleetOfHosts, end: str) -> None:
    """Waits for a key."""
    with trio.fail_after(READY_S):
        async with open_etcd(found.cluster.settings()) as etcd:
            while True:
                if any(entry.key.endswith(end) for entry in (await etcd.list("volant/"))[0]):
                    return
                await trio.sleep(0.1)


async def pages(http: httpx.AsyncClient, path: str) -> list[list[str]]:
    found = []
    following: str | None = path
    while following is not None:
        answer = await http.get(following)
        found.append(names(answer))
        following = answer.links.get("next", {}).get("url")
    return found


@pytest.mark.full
async def test_a_list_is_that_of_all_hosts(tmp_path: Path) -> None:
    with fleet(tmp_path, "h1", "h2", "h3", flags=NO_BOOT) as found:
        await found.cluster.ready()
        await found.up()
        async with found["h1"].http() as h1, found["h2"].http() as h2:
            for host, vm in (("h1", "a"), ("h2", "b"), ("h3", "c"), ("h1", "d"), ("h3", "e")):
                body = {"name": vm, "memory_mb": 128, "labels": {"on": host}}
                made = await h1.post("/api/v1/vms?wait=crashed", json=body, headers=on(host))
                assert (made.status_code, made.headers["Volant-Wait"]) == (201, "met"), made.text
                volume = await h1.post("/api/v1/volumes", json={"name": vm, "size_mb": 32}, headers=on(host))
                assert volume.status_code == 201, volume.text
            vms = await h1.get("/api/v1/vms")
            assert sorted(names(vms)) == list("abcde")
            assert names(await h2.get("/api/v1/vms")) == names(vms)
            assert "Volant-Missing-Hosts" not in vms.headers
            # One host, if the request names it.
            assert names(await h1.get("/api/v1/vms", headers=on("h1"))) == ["a", "d"]
            assert names(await h1.get("/api/v1/vms", headers=on("h3"))) == ["c", "e"]
            assert names(await h1.get("/api/v1/vms?label=on=h3")) == ["c", "e"]
            assert names(await h2.get("/api/v1/volumes")) == list("abcde")
            volar = (sys.executable, "-m", "volant.cli.main", "--api", found["h1"].daemon.base_url)
            shown = await trio.run_process([*volar, "--host", "h3", "vms", "list", "--json"], capture_stdout=True)
            assert [vm["name"] for vm in json.loads(shown.stdout)] == ["c", "e"]
            # Pages, of any size and continued at another host, are the same list.
            for limit in (1, 2, 3, 5):
                found_pages = await pages(h1, f"/api/v1/vms?limit={limit}")
                assert [name for page in found_pages for name in page] == names(vms)
                assert all(len(page) == limit for page in found_pages[:-1])
            first = await h1.get("/api/v1/vms?limit=2")
            rest = await h2.get(first.links["next"]["url"])
            assert names(first) + names(rest) == names(vms)[:4]
            page = await tool(h2, "vms_list")
            assert ([vm["name"] for vm in page["vms"]], page["total"]) == (names(vms), 5)
            assert "missing_hosts" not in page

            await in_etcd(found, "/records/default/e")
            found["h3"].daemon.kill()
            # It still gives a sign of life, and later none.
            for _ in range(2):
                vms = await h1.get("/api/v1/vms")
                assert vms.headers["Volant-Missing-Hosts"] == "h3"
                assert sorted(names(vms)) == list("abcde")
                assert {vm["name"] for vm in vms.json() if vm["unreachable"] == "h3"} == {"c", "e"}
                assert [name for page in await pages(h1, "/api/v1/vms?limit=2") for name in page] == names(vms)
                assert (await tool(h1, "vms_list"))["missing_hosts"] == ["h3"]
                assert names(await h1.get("/api/v1/volumes")) == ["a", "b", "d"]
                await found.sees("h1", lambda hosts: [each["state"] for each in hosts] == ["up", "up", "unreachable"])
            assert "'h3' gives no sign of life" in await tool(h1, "vms_start", vm="c")
            found["h3"].daemon.start()
            await found.up()
            assert "Volant-Missing-Hosts" not in (await h1.get("/api/v1/vms")).headers
