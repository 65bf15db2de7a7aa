"""A boot that fails as its VM was frozen is no crash, however soon it may run again."""

from __future__ import annotations

from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import trio

from volant.hypervisor import LaunchFailed
from volant.model import AwaitAgent, CreateVm, Effect, Launch, Manifest, Movable, StepFailed, VmRow, new_row
from volant.vm._fence import NoFence
from volant.vm._steps import Steps
from volant.vm.messages import StepError

NOW = datetime(2026, 1, 2, tzinfo=UTC)
REQUEST = CreateVm(name="demo", cpu_cores=1, memory_mb=128)


class Fence(NoFence):
    """Opens at once whenever it is closed."""

    is_open = True

    async def opened(self) -> None:
        await trio.lowlevel.checkpoint()

    def flicker(self) -> None:
        self.times_closed += 1


class Failing(Steps):
    """Fails twice, and only the first time while it was frozen."""

    def __init__(self, fence: Fence, row: VmRow) -> None:
        deps: Any = SimpleNamespace(fence=fence)
        vm: Any = SimpleNamespace(process=None, row=row)
        super().__init__(deps, vm)
        self.fence = fence
        self.tries = 0

    async def _launch_now(self, row: VmRow, tag: str) -> Any:
        raise LaunchFailed("exited", self._try())

    async def _await_agent_now(self, row: VmRow) -> Any:
        raise StepError("agent_timeout", self._try())

    def _try(self) -> str:
        self.tries += 1
        if self.tries == 1:
            self.fence.flicker()
        return f"try {self.tries}"


@pytest.mark.parametrize("effect", [Launch(tag="tag"), AwaitAgent(tag="tag")])
@pytest.mark.parametrize(("movable", "tries"), [(Movable(id="1", request=REQUEST), 2), (None, 1)])
async def test_what_fails_while_the_fence_was_closed_is_tried_again(
    effect: Effect, movable: Movable | None, tries: int
) -> None:
    row = msgspec.structs.replace(new_row(REQUEST, Manifest(name="base"), vm_id=1, now=NOW), movable=movable)
    steps = Failing(Fence(), row)
    with trio.fail_after(20):
        seen = await steps.run(effect)
    assert isinstance(seen, StepFailed)
    assert (seen.reason.message, steps.tries) == (f"try {tries}", tries)
