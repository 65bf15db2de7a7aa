"""AG-UI's own client, verifier, schemas and models accept a run of three concurrent VMs, one of which crashes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from ag_ui.core import Event as AguiModel
from pydantic import TypeAdapter

from tests.conformance.kit import Node
from tests.system.kit import BOOT_S, Daemon, kill_hypervisor, spec, websocket
from volant.client import Client

# The tests watch a boot, which has to take some time.
pytestmark = pytest.mark.cold

NAMES = ("one", "two", "three")
_model: TypeAdapter[Any] = TypeAdapter(AguiModel)


async def listen(url: str, events: list[Any], over: Callable[[Any], bool], task_status: trio.TaskStatus[None]) -> None:
    """Collects events until the one after which the client leaves."""
    async with websocket(url) as connection:
        task_status.started()
        while not events or not over(events[-1]):
            events.append(json.loads(await connection.get_message()))


def is_end(event: Any) -> bool:
    return event["type"] in ("RUN_FINISHED", "RUN_ERROR")


def happened(events: list[Any]) -> list[tuple[str, str]]:
    return [(event["value"]["name"], event["value"]["type"]) for event in events if event["type"] == "CUSTOM"]


async def verify(node: Node, events: list[Any], path: Path) -> None:
    """Validates events with the models of the Python package, and the schemas and verifier of the JavaScript one."""
    for event in events:
        _model.validate_json(json.dumps(event))
    await trio.Path(path).write_text(json.dumps(events))
    passed = await trio.to_thread.run_sync(partial(node.run, "agui_verify.mjs", str(path), timeout_s=60))
    assert passed == [len(events)]


async def http_agent(node: Node, url: str, results: list[Any]) -> None:
    """Runs AG-UI's unmodified `HttpAgent` once."""
    results += await trio.to_thread.run_sync(partial(node.run, "agui_http.mjs", url, timeout_s=2 * BOOT_S))


async def live_and_die(client: Client) -> None:
    """Boots three VMs at once; one crashes, one stops, and all are deleted."""
    for name in NAMES:
        await client.vms.create(spec(name))
    for name in NAMES:
        await client.vms.wait(name, {"running"}, timeout_s=BOOT_S)
    kill_hypervisor(await client.vms.get("two"))
    await client.vms.wait("two", {"crashed"}, timeout_s=BOOT_S)
    await client.vms.stop("one")
    await client.vms.wait("one", {"stopped"}, timeout_s=BOOT_S)
    for name in NAMES:
        await client.vms.delete(name)


@pytest.mark.full
async def test_a_run_with_three_vms(daemon: Daemon, node: Node, tmp_path: Path) -> None:
    socket = f"{daemon.base_url.replace('http', 'ws', 1)}/ws/v1/agui"
    overview: list[Any] = []
    over_http: list[Any] = []
    with trio.fail_after(4 * BOOT_S):
        async with daemon.client() as client, trio.open_nursery() as nursery:
            await nursery.start(
                listen, socket, overview, lambda event: happened([event]) == [(NAMES[-1], "VM_DELETED")]
            )
            nursery.start_soon(http_agent, node, f"{daemon.base_url}/api/v1/agui?duration=25s", over_http)
            await live_and_die(client)
    await verify(node, overview, tmp_path / "overview.json")
    told = happened(overview)
    assert ("two", "VM_CRASHED") in told
    assert told.index((NAMES[-1], "VM_RUNNING")) < told.index(("two", "VM_CRASHED"))
    (agent,) = over_http
    assert agent["failure"] is None
    assert agent["events"][0]["type"] == "RUN_STARTED"
    assert agent["events"][-1]["type"] == "RUN_FINISHED"
    assert happened(agent["events"])
    assert agent["state"].keys() == {"vms"}


async def test_the_boot_of_one_vm_is_a_run_that_resumes(daemon: Daemon, node: Node, tmp_path: Path) -> None:
    socket = f"{daemon.base_url.replace('http', 'ws', 1)}/ws/v1/agui?vm=one&thread_id=t&run_id=r"
    events: list[Any] = []
    over_http: list[Any] = []
    with trio.fail_after(3 * BOOT_S):
        async with daemon.client() as client, trio.open_nursery() as nursery:
            await client.vms.create(spec("one"))
            nursery.start_soon(http_agent, node, f"{daemon.base_url}/api/v1/agui?vm=one", over_http)
            # Disconnect while a step is open, and resume.
            await nursery.start(listen, socket, events, lambda event: event["type"] == "STEP_STARTED")
            await client.vms.wait("one", {"running"}, timeout_s=BOOT_S)
            cut = len(events)
            assert events[-1]["type"] == "STEP_STARTED"
            await nursery.start(listen, f"{socket}&resume=true&step={events[-1]['stepName']}", events, is_end)
            kill_hypervisor(await client.vms.get("one"))
    assert events[cut]["type"] == "STATE_SNAPSHOT"
    await verify(node, events, tmp_path / "boot.json")
    assert [event["type"] for event in events].count("RUN_STARTED") == 1
    assert events[-1]["type"] == "RUN_ERROR"
    (agent,) = over_http
    assert agent["events"][0]["type"] == "RUN_STARTED"
    assert agent["events"][-1]["type"] == "RUN_ERROR"
    assert agent["messages"]
