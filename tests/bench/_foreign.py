"""Measures what requests cost more that another host of the fleet has to answer, and what an idle host asks of etcd."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import httpx
import trio

from tests.fleet.hosts import FleetOfHosts, fleet

from . import _browser
from ._boot import BOOT_S, WANTED
from ._figure import Figure, Pairs, percentile
from ._first_exec import execute
from ._http import connect
from ._relays import Connect, download_http, trip_s
from ._template import first_template
from ._world import Skipped, current_image, scratch

CREATE_MS, TIMES = 10.0, 1.5
_SETTLE_S = 0.2
_VM = "measured"
_PORT = 9222
_SIZE = 16 * 1024 * 1024
_Act = Callable[[httpx.AsyncClient, int], Awaitable[None]]


async def foreign(creates: int = 30, requests: int = 100, idle_s: float = 60.0) -> list[Figure]:
    """Creates, commands and reads through a host that has to ask another one, beside the same at that one itself."""
    current_image()
    figures = []
    with scratch() as directory, fleet(directory, "h1", "h2", flags=("--templates", "auto")) as found:
        await found.cluster.ready()
        await found.up()
        figures.append(await _idle(found, idle_s))
        await first_template(found["h2"].daemon, "h2")
        async with found["h1"].http() as other, found["h2"].http() as own:
            pairs = await _in_turns(other, own, creates, _create)
            extra_ms = 1000 * (pairs.value - pairs.other)
            figures.append(
                Figure(
                    "foreign_create", extra_ms, "ms", within=CREATE_MS,
                    to=f"more than the {1000 * pairs.other:.3g} ms of a local one",
                )
            )  # fmt: skip
            body = {"name": _VM, "cpu_cores": WANTED.cpu_cores, "memory_mb": WANTED.memory_mb}
            made = await own.post(f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json=body, headers=_AT_H2)
            made.raise_for_status()
            await execute(own, _VM)
            for name, act in (("foreign_exec", _exec), ("foreign_get", _get)):
                pairs = await _in_turns(other, own, requests, act)
                figures.append(
                    Figure(
                        name, 1000 * pairs.value, "ms", pairs.value / pairs.other,
                        f"the local one's {1000 * pairs.other:.3g} ms; p95 {1000 * percentile(pairs.ours, 95):.3g} ms",
                        at_most=TIMES if act is _exec else None,
                    )
                )  # fmt: skip
    return figures


async def foreign_relays(rounds: int = 5) -> list[Figure]:
    """A round trip of a CDP command, and 16 MiB out of a guest, through a host that has to ask another one, beside the
    same at that one itself."""
    current_image()
    with scratch() as directory, fleet(directory, "h1", "h2") as found:
        await found.cluster.ready()
        await found.up()
        async with found["h2"].http() as http:
            plugin = {"name": "browser", "devtools": {"port": _PORT}}
            (await http.post("/api/v1/plugins", json=plugin)).raise_for_status()
            body = {
                "name": _VM, "cpu_cores": WANTED.cpu_cores, "memory_mb": WANTED.memory_mb, "plugin": "browser"
            }  # fmt: skip
            made = await http.post(f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json=body, headers=_AT_H2)
            made.raise_for_status()
            script = 'python3 -c "$1" "$2" </dev/null >/dev/null 2>&1 &'
            command = ["sh", "-c", script, "sh", inspect.getsource(_browser), str(_PORT)]
            began = await http.post(f"/api/v1/vms/{_VM}/agent/v1/exec", json={"command": command})
            began.raise_for_status()
            with trio.fail_after(BOOT_S):
                while (await http.get(f"/api/v1/vms/{_VM}/ports/{_PORT}/1")).status_code != 200:  # noqa: ASYNC110
                    await trio.sleep(_SETTLE_S)
        ways = [partial(connect, found[name].daemon.base_url) for name in ("h1", "h2")]
        return await trio.to_thread.run_sync(_relayed, ways, rounds)


def _relayed(ways: Sequence[Connect], rounds: int) -> list[Figure]:
    trips, rates = Pairs(), Pairs()
    for _ in range(rounds):
        trips.add(*(trip_s(way, f"/ws/v1/vms/{_VM}/devtools/page/1") for way in ways))
        rates.add(*(download_http(way, f"/api/v1/vms/{_VM}/ports/{_PORT}", _SIZE) for way in ways))
    return [
        Figure(
            "foreign_cdp_round_trip", 1000 * trips.value, "ms", trips.ratio,
            f"the local one's {1000 * trips.other:.3g} ms", at_most=TIMES,
        ),
        Figure("foreign_relay_port", rates.value, "MB/s", rates.ratio, f"the local one's {rates.other:.3g} MB/s"),
    ]  # fmt: skip


_AT_H2 = {"Volant-Host": "h2"}


async def _in_turns(other: httpx.AsyncClient, own: httpx.AsyncClient, rounds: int, act: _Act) -> Pairs:
    """Returns the seconds of requests to a host that has to pass them on, and to the one that can do them."""
    pairs = Pairs()
    for number in range(rounds + 1):
        took = []
        for http in (other, own):
            began = time.perf_counter()
            await act(http, number)
            took.append(time.perf_counter() - began)
            if act is _create:
                (await own.delete(f"/api/v1/vms/made{number}", timeout=BOOT_S)).raise_for_status()
                await trio.sleep(_SETTLE_S)
        if number:
            # The first ones load code.
            pairs.add(*took)
    return pairs


async def _create(http: httpx.AsyncClient, number: int) -> None:
    body = {"name": f"made{number}", "cpu_cores": WANTED.cpu_cores, "memory_mb": WANTED.memory_mb}
    (await http.post("/api/v1/vms", json=body, headers=_AT_H2, timeout=BOOT_S)).raise_for_status()


async def _exec(http: httpx.AsyncClient, number: int) -> None:
    await execute(http, _VM)


async def _get(http: httpx.AsyncClient, number: int) -> None:
    (await http.get(f"/api/v1/vms/{_VM}")).raise_for_status()


async def _idle(found: FleetOfHosts, seconds: float) -> Figure:
    """Counts the requests that etcd has got, of both hosts."""
    before = await _requests(found)
    await trio.sleep(seconds)
    each = (await _requests(found) - before - 1) / len(found.hosts)
    return Figure("etcd_requests_idle", 60 * each / seconds, "a minute", to="of each host without changes")


async def _requests(found: FleetOfHosts) -> float:
    context = found.cluster.settings().context
    assert context is not None
    async with httpx.AsyncClient(verify=context, trust_env=False) as http:
        text = (await http.get(f"{found.cluster.members[0].url}/metrics")).text
    counts = re.findall(r"^grpc_server_started_total\{.*?\} (\S+)$", text, re.M)
    if not counts:
        raise Skipped("this etcd counts no requests")
    return sum(map(float, counts))
