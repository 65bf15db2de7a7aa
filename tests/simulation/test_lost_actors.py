"""A VM whose actor does not start says so, and can be recovered."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import msgspec
import pytest
import trio

from tests.names import named
from tests.simulated import World
from tests.simulation.kit import JSON, VMS, run_story
from volant.model import Status
from volant.vm._actor import VmActor


def test_a_vm_whose_actor_fails_as_it_starts_can_be_recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, failures = VmActor.on_start, 1

    async def on_start(self: VmActor) -> None:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        await start(self)

    async def story(world: World) -> None:
        monkeypatch.setattr(VmActor, "on_start", on_start)
        body = msgspec.json.encode({"name": "a", "cpu_cores": 1, "memory_mb": 64})
        made = await world.request("POST", VMS, body, JSON)
        assert made.status == 503
        row = world.daemon.store.projection.get(named("a"))
        assert row is not None
        assert row.reason is not None
        assert row.reason.code == "control_lost"
        # 409 if the actor, which this request starts, already has control when it handles it.
        assert (await world.request("POST", f"{VMS}/a/recover")).status in (200, 409)
        with trio.fail_after(120):
            while (row := world.daemon.store.projection.get(named("a"))) is None or row.status is not Status.RUNNING:  # noqa: ASYNC110
                await trio.sleep(1)
        assert row.reason is None

    run_story(tmp_path, story, seed=1)
