"""A fleet of real hosts: each answers for all, and no name is given twice."""

from __future__ import annotations

import json
import signal
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio

from tests.fleet.cluster import needs_etcd
from tests.fleet.hosts import READY_S, fleet

pytestmark = [pytest.mark.system, needs_etcd]


def output_of(done: httpx.Response) -> bytes:
    lines = map(json.loads, done.text.splitlines())
    return b"".join(b64decode(line["data"]) for line in lines if "data" in line)


async def create(http: httpx.AsyncClient, name: str, host: str | None = None, **more: Any) -> httpx.Response:
    body = {"name": name, "memory_mb": 128, **more}
    return await http.post("/api/v1/vms?wait=running", json=body, headers={} if host is None else {"Volant-Host": host})


async def until(http: httpx.AsyncClient, path: str, holds: Callable[[httpx.Response], bool]) -> httpx.Response:
    """Asks until the answer is as wanted."""
    answer = None
    with trio.move_on_after(READY_S):
        while True:
            answer = await http.get(path)
            if holds(answer):
                return answer
            await trio.sleep(0.05)
    raise AssertionError(f"{path}: {answer and answer.text}")


async def test_any_host_answers_for_all(tmp_path: Path) -> None:
    with fleet(tmp_path, "h1", "h2") as found:
        await found.cluster.ready()
        await found.up()
        async with found["h1"].http() as h1, found["h2"].http() as h2:
            made = await create(h1, "web", "h2")
            assert made.status_code == 201, made.text
            assert (made.headers["Volant-Host"], made.json()["status"]) == ("h2", "running")
            # Its id is of a block of its host's own.
            assert made.json()["id"] // 10**9 >= 1
            for http in (h1, h2):
                shown = await http.get("/api/v1/vms/web")
                assert (shown.status_code, shown.headers["Volant-Host"]) == (200, "h2")
                assert [vm["name"] for vm in (await http.get("/api/v1/vms")).json()] == ["web"]
            done = await h1.post("/api/v1/vms/web/agent/v1/exec", json={"command": ["hostname"]})
            assert (done.status_code, output_of(done)) == (200, b"web\n")
            elsewhere, there = [await http.post("/api/v1/vms/web/origins", json={"port": 80}) for http in (h1, h2)]
            assert (elsewhere.status_code, elsewhere.json()["type"]) == (409, "urn:volant:error:port-elsewhere")
            assert (there.status_code, "'h2'" in elsewhere.json()["detail"]) == (200, True)
            again = await create(h1, "web", "h1")
            assert (again.status_code, again.json()["type"]) == (409, "urn:volant:error:name-taken")
            assert (await h1.delete("/api/v1/vms/web")).status_code == 204
            assert (await h1.get("/api/v1/vms/web")).status_code == 404
            # The name is free at once.
            second = await create(h2, "web", "h1")
            assert (second.status_code, second.headers["Volant-Host"]) == (201, "h1")
            assert second.json()["id"] // 10**9 != made.json()["id"] // 10**9
            assert (await h2.delete("/api/v1/vms/web")).status_code == 204


@pytest.mark.full
async def test_hosts_come_and_go(tmp_path: Path) -> None:
    """A name is given once, a draining host gets no VM, and what a dead host had is shown as it last was."""
    with fleet(tmp_path, "h1", "h2") as found:
        await found.cluster.ready()
        await found.up()
        async with found["h1"].http() as h1, found["h2"].http() as h2:
            answers: list[httpx.Response] = []

            async def race(http: httpx.AsyncClient, host: str) -> None:
                answers.append(await create(http, "one", host))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(race, h1, "h1")
                nursery.start_soon(race, h2, "h2")
            assert sorted(answer.status_code for answer in answers) == [201, 409], [each.text for each in answers]
            assert (await h1.delete("/api/v1/vms/one")).status_code == 204

            drained = await h1.post("/api/v1/hosts/h1/drain")
            assert (drained.status_code, drained.json()["draining_since"] is not None) == (200, True)
            kept = await create(h1, "kept")
            assert (kept.status_code, kept.headers["Volant-Host"]) == (201, "h2"), kept.text
            assert (await h1.post("/api/v1/hosts/h1/undrain")).json()["draining_since"] is None

        found["h2"].daemon.kill()
        async with found["h1"].http() as h1:
            shown = await until(h1, "/api/v1/vms/kept", lambda answer: answer.json().get("unreachable") == "h2")
            assert shown.status_code == 200
            assert shown.json()["status"] in ("starting", "running"), "its host may have died before it said more"
            listed = await h1.get("/api/v1/vms")
            assert (listed.headers["Volant-Missing-Hosts"], listed.json()[0]["unreachable"]) == ("h2", "h2")
            refused = await h1.post("/api/v1/vms/kept/agent/v1/exec", json={"command": ["true"]})
            assert (refused.status_code, refused.json()["type"]) == (503, "urn:volant:error:host-unreachable")
            again = await create(h1, "kept", "h1")
            assert again.status_code == 409, again.text
            found["h2"].daemon.start()
            await until(h1, "/api/v1/vms/kept", lambda answer: answer.json().get("unreachable", "") is None)
            done = await h1.post("/api/v1/vms/kept/agent/v1/exec", json={"command": ["hostname"]})
            assert (done.status_code, output_of(done)) == (200, b"kept\n")


@pytest.mark.full
async def test_without_etcd_vms_run_on_and_names_are_not_given(tmp_path: Path) -> None:
    with fleet(tmp_path, "h1") as found:
        await found.cluster.ready()
        await found.up()
        async with found["h1"].http() as h1:
            assert (await create(h1, "web")).status_code == 201
            (member,) = found.cluster.members
            member.send(signal.SIGSTOP)
            try:
                refused = await create(h1, "other")
                assert (refused.status_code, refused.json()["type"]) == (503, "urn:volant:error:fleet-unavailable")
                # Nobody knows that there is no such VM.
                unknown = await h1.get("/api/v1/vms/other")
                assert (unknown.status_code, unknown.json()["type"]) == (503, "urn:volant:error:fleet-unavailable")
                fleet_now = await until(h1, "/api/v1/fleet", lambda answer: answer.json()["etcd"] == "unreachable")
                assert fleet_now.json()["trouble"]
                done = await h1.post("/api/v1/vms/web/agent/v1/exec", json={"command": ["hostname"]})
                assert (done.status_code, output_of(done)) == (200, b"web\n")
                assert (await h1.get("/api/v1/vms/web")).json()["unreachable"] is None
            finally:
                member.send(signal.SIGCONT)
            await until(h1, "/api/v1/fleet", lambda answer: answer.json()["etcd"] == "ok")
            assert (await create(h1, "other")).status_code == 201
