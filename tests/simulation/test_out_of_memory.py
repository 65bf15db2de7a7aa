"""A hypervisor that the kernel has killed for lack of memory is told from one that was killed otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trio

from tests.simulated import World
from tests.simulated.file_system import File
from tests.simulated.limits import SimLimits
from tests.simulation.kit import JSON, run_story
from volant.host import _cgroups
from volant.model import ProcessIdentity


def oom_events(self: SimLimits, identity: ProcessIdentity) -> Path:
    """The simulated machine has no control groups but these."""
    files = self._calls.machine.files
    path = Path("/run/groups") / identity.tag
    if files.find(path) is None:
        files.mkdir(path.parent)
        files.put(path, File(bytearray(b"oom 0\noom_kill 0\n")))
    return path


def oom_kills(self: SimLimits, events: Path) -> int:
    return _cgroups.oom_kills(bytes(self._calls.machine.files.file(events).data).decode())


@pytest.mark.parametrize(
    ("count", "adopted", "code"),
    [(1, False, "out_of_memory"), (1, True, "out_of_memory"), (0, False, "hypervisor_killed")],
)
def test_the_reason_tells_a_lack_of_memory_from_another_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, adopted: bool, code: str
) -> None:
    monkeypatch.setattr(SimLimits, "oom_events", oom_events)
    monkeypatch.setattr(SimLimits, "oom_kills", oom_kills)

    async def story(world: World) -> None:
        body = {"name": "demo", "cpu_cores": 1, "memory_mb": 64, "boot": "cold"}
        made: Any = (await world.request("POST", "/api/v1/vms?wait=running", body, JSON)).json()
        assert made["status"] == "running"
        if adopted:
            await world.kill_daemon()
            await world.start_daemon()
        await trio.sleep(5)
        [qemu] = world.machine.running()
        # The kernel counts before it kills.
        events = world.machine.files.file(Path("/run/groups") / qemu.tag)
        events.data[:] = f"oom 1\noom_kill {count}\n".encode()
        qemu.process.end(-9)
        vm: Any = (await world.request("GET", "/api/v1/vms/demo?wait=crashed")).json()
        assert (vm["status"], vm["reason"]["code"]) == ("crashed", code)
        assert ("short of memory" in vm["reason"]["message"]) == bool(count)

    run_story(tmp_path, story, seed=5)
