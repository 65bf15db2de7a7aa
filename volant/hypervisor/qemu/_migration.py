"""A machine's state into a file, and out of it again.

QEMU calls that a migration. With `x-ignore-shared` memory that lies in a file of its own stays there, and what is saved
are the devices: 130 kB, in some ten milliseconds. QEMU tells of each turn of it by an event, so nobody polls.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio

from ._qmp import QmpClient, QmpLost, QmpRefused

TAKE_OVER_S = 10.0
_SILENCE_S = 5.0
_LOOK_AGAIN_S = 0.01

CAPABILITY = "x-ignore-shared"
"""A stream made with it is taken by nobody who has it not, and the other way round."""
_CAPABILITIES = {"capabilities": [{"capability": CAPABILITY, "state": True}, {"capability": "events", "state": True}]}
_SILENT = {"announce-rounds": 0}
"""Else QEMU itself, and the guest's driver, would tell the network of an address that is the original's."""
_OVER = frozenset({"completed", "failed", "cancelled"})


async def _await_silence(qmp: QmpClient) -> None:
    """Return once QEMU knows that nobody is connected to the agent's port.

    virtio-serial tells the guest of it by writing to its memory, whether or not the machine is stopped. When that comes
    after the device was saved, memory and device contradict each other, and no clone ever answers ("Virtqueue size
    exceeded"; seen with QEMU 10.0 in one of twenty templates on a busy host).
    """
    with trio.move_on_after(_SILENCE_S):
        while True:
            for each in await qmp.execute("query-chardev") or ():
                if each.get("label") == "agent" and str(each.get("filename")).startswith("disconnected:"):
                    return
            await trio.sleep(_LOOK_AGAIN_S)
    raise QmpRefused("somebody is connected to the agent's port, and so the machine can't be saved")


async def _begin_take_over(qmp: QmpClient, state: Path) -> None:
    await qmp.execute("migrate-set-capabilities", _CAPABILITIES)
    await qmp.execute("migrate-set-parameters", _SILENT)
    await qmp.execute("migrate-incoming", {"uri": f"file:{state}"})


async def finish_take_over(qmp: QmpClient, state: Path) -> None:
    """Let a machine that a killed daemon has launched take over a state, whether or not that has begun. It does not go
    on yet. Raises QmpRefused, QmpLost; QEMU may end by itself then.

    Polls, as whether QEMU sends events can't be changed any more once it loads.
    """
    asked = False
    with trio.move_on_after(TAKE_OVER_S):
        while True:
            info = await qmp.execute("query-migrate")
            said = info if isinstance(info, dict) else {}
            status = said.get("status", "none")
            if status == "completed":
                return
            if status in _OVER:
                raise QmpRefused(f"the template does not fit: {said.get('error-desc') or status}")
            if status == "none" and not asked:
                asked = True
                await _begin_take_over(qmp, state)
            await trio.sleep(_LOOK_AGAIN_S)
    raise QmpLost(f"QEMU did not load its state within {TAKE_OVER_S:g} s")


class Migration:
    """One, on one control socket: give its events to `on_event`."""

    def __init__(self) -> None:
        self._status = ""
        self._over = trio.Event()

    def on_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "MIGRATION":
            self._status = str(data.get("status"))
            if self._status in _OVER:
                self._over.set()

    async def save(self, qmp: QmpClient, state: Path, timeout_s: float) -> None:
        """Stop the machine and save it. Raises QmpRefused, QmpLost."""
        await _await_silence(qmp)
        await qmp.execute("stop")
        await qmp.execute("migrate-set-capabilities", _CAPABILITIES)
        await qmp.execute("migrate", {"uri": f"file:{state}"})
        await self._end(qmp, timeout_s, "the machine could not be saved")

    async def take_over(self, qmp: QmpClient, state: Path) -> None:
        """Let a machine that waits for a state take it over. It does not go on yet. Raises QmpRefused, QmpLost; QEMU
        may end by itself then."""
        await _begin_take_over(qmp, state)
        await self._end(qmp, TAKE_OVER_S, "the template does not fit")

    async def _end(self, qmp: QmpClient, timeout_s: float, failure: str) -> None:
        async def watch(scope: trio.CancelScope) -> None:
            await qmp.lost.wait()
            scope.cancel()

        with trio.move_on_after(timeout_s):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, nursery.cancel_scope)
                await self._over.wait()
                nursery.cancel_scope.cancel()
        if self._status == "completed":
            return
        if qmp.lost.is_set():
            raise QmpLost(qmp.why)
        if not self._over.is_set():
            raise QmpLost(f"QEMU did not come to an end with it within {timeout_s:g} s: {self._status or 'no event'}")
        info = await qmp.execute("query-migrate")
        text = info.get("error-desc") if isinstance(info, dict) else None
        raise QmpRefused(f"{failure}: {text or self._status}")
