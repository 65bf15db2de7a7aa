"""Saves a machine's state to a file, and loads it.

QEMU calls both a migration. With `x-ignore-shared`, memory in a shared file stays there, and only the devices are
saved: 130 kB in about ten milliseconds. QEMU reports progress with events.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from volant.concurrency import open_helpers
from volant.host import Host
from volant.hypervisor._interface import MachineSpec

from ._qmp import QmpClient, QmpLost, QmpRefused

# Saves the devices of a paused machine.
#
# Xen's command `xen-save-devices-state` takes two milliseconds, writes 120 kB and leaves the machine as if it had only
# been paused. It does not save the memory of firmware, which a guest no longer needs once its kernel runs. So a
# migration saves the templates that it can. It can't save a clone, as `x-ignore-shared` only skips shared memory, and
# the rest would be written to the stream; nor a machine with the disk of an OCI image, as QEMU migrates none with a
# disk of that format, although nothing of a disk that is only read has to be handed over.
#
# The command omits the sections with the machine type, the capabilities and the description of the stream. `migrate-
# incoming` needs them, so this module adds them (for QEMU 10.0).


SAVE_S = 30.0
_HEAD = b"QEVM" + struct.pack(">I", 3)
_CONFIGURATION = 0x07
_SUBSECTION = 0x05
_DESCRIPTION = bytes([0x06]) + struct.pack(">I", 0)


async def save_devices(qmp: QmpClient, state: Path, timeout_s: float = SAVE_S) -> None:
    """Saves the devices to a file that QEMU can write. Raises QmpRefused, QmpLost."""
    arguments = {"filename": str(state), "live": False}
    await qmp.execute("xen-save-devices-state", arguments, timeout_s=timeout_s)


async def machine_type(qmp: QmpClient) -> str:
    """Returns the machine's versioned type. Raises QmpRefused, QmpLost."""
    found = await qmp.execute("qom-get", {"path": "/machine", "property": "type"})
    return str(found).removesuffix("-machine")


def complete(state: bytes, machine: str) -> bytes:
    """Adds the missing sections to a stream of devices. Raises OSError when it is not such a stream."""
    head, rest = state[: len(_HEAD)], state[len(_HEAD) :]
    if head != _HEAD:
        raise OSError(errno.EINVAL, "QEMU saved the devices in an unknown format")
    name, section = machine.encode(), b"configuration/capabilities"
    configuration = (
        *(bytes([_CONFIGURATION]), struct.pack(">I", len(name)), name),
        *(bytes([_SUBSECTION, len(section)]), section, struct.pack(">I", 1)),
        *(struct.pack(">I", 1), bytes([len(CAPABILITY)]), CAPABILITY.encode()),
    )
    return head + b"".join(configuration) + rest + _DESCRIPTION


LOAD_S = 10.0
_DISCONNECT_S = 5.0
_POLL_S = 0.01
_QUIET = 3
"""This many answers without a byte in between mean that no data is pending."""

CAPABILITY = "x-ignore-shared"
"""The capability for both directions: a stream that was saved with it can only be loaded with it."""
_CAPABILITIES = {"capabilities": [{"capability": CAPABILITY, "state": True}, {"capability": "events", "state": True}]}
_NO_ANNOUNCEMENTS = {"announce-rounds": 0}
"""Otherwise QEMU and the guest's driver would announce the original's address on the network."""
_OVER = frozenset({"completed", "failed", "cancelled"})


async def _poll_until(done: Callable[[], Awaitable[bool]], timeout_s: float) -> bool:
    """Returns whether `done` became true in time."""
    with trio.move_on_after(timeout_s):
        while not await done():  # noqa: ASYNC110 - QEMU sends no event
            await trio.sleep(_POLL_S)
        return True
    return False


async def await_disconnect(qmp: QmpClient) -> None:
    """Waits until QEMU has noticed that the agent's port is not connected.

    virtio-serial then writes to the guest's memory, even if the machine is stopped. If that happened after the device
    was saved, memory and device would be inconsistent, and no clone would ever answer ("Virtqueue size exceeded"; seen
    with QEMU 10.0 in one of twenty templates on a busy host). Polls, as QEMU sends no event.
    """

    if not await _poll_until(partial(_has_peer, qmp, False), _DISCONNECT_S):
        raise QmpRefused("the machine can't be saved while a client is connected to the agent's port")


async def _has_peer(qmp: QmpClient, wanted: bool) -> bool:
    """Returns whether QEMU sees a connection to the agent's port (`wanted`), or none."""
    ports = await qmp.execute("query-chardev") or ()
    names = [str(port.get("filename")) for port in ports if port.get("label") == "agent"]
    return any(name.startswith("disconnected:") is not wanted for name in names)


@asynccontextmanager
async def _listening(host: Host, spec: MachineSpec, qmp: QmpClient) -> AsyncIterator[None]:
    """Reads the agent's port while a machine loads its state in the block, and until there is nothing left to read.

    If the port was full when the machine was copied, QEMU writes the pending data as soon as it is loaded. Without a
    reader it stops in the middle, and QEMU 10.0 then waits for an event that never arrives (`flush_buf` in its
    hw/char/virtio-console.c): the guest can't send any more, not even after a connection.
    """
    if spec.vsock_cid is not None:
        yield
        return
    try:
        stream = await host.sockets.connect_unix(spec.agent_path, LOAD_S)
    except (OSError, trio.TooSlowError) as error:
        raise QmpLost(f"the hypervisor's agent socket: {str(error) or 'no answer'}") from error
    count = 0

    async def read() -> None:
        nonlocal count
        with suppress(trio.BrokenResourceError):
            while data := await stream.receive_some(65536):
                count += len(data)

    async with stream, open_helpers() as helpers:
        if not await _poll_until(partial(_has_peer, qmp, True), LOAD_S):
            raise QmpLost("the hypervisor accepts no connection at the agent's port")
        helpers.start_soon(read)
        yield
        quiet = 0
        with trio.move_on_after(LOAD_S):
            while quiet < _QUIET:
                before = count
                # QEMU writes more, if there is more, before it answers.
                await qmp.execute("query-status")
                quiet = quiet + 1 if count == before else 0


async def _begin_loading(qmp: QmpClient, state: Path) -> None:
    await qmp.execute("migrate-set-capabilities", _CAPABILITIES)
    await qmp.execute("migrate-set-parameters", _NO_ANNOUNCEMENTS)
    await qmp.execute("migrate-incoming", {"uri": f"file:{state}"})


async def finish_loading(host: Host, spec: MachineSpec, qmp: QmpClient) -> None:
    """Finishes loading a template, for a machine whose daemon was killed before or while it loaded. The machine stays
    paused.

    Polls, as events can't be turned on once loading has begun. Raises QmpRefused, QmpLost; QEMU may exit then.
    """
    assert spec.template is not None
    state, begun = spec.template.state, False

    async def loaded() -> bool:
        nonlocal begun
        answer = await qmp.execute("query-migrate")
        info = answer if isinstance(answer, dict) else {}
        status = info.get("status", "none")
        if status == "completed":
            return True
        if status in _OVER:
            raise QmpRefused(f"the template does not fit: {info.get('error-desc') or status}")
        if status == "none" and not begun:
            begun = True
            await _begin_loading(qmp, state)
        return False

    async with _listening(host, spec, qmp):
        if not await _poll_until(loaded, LOAD_S):
            raise QmpLost(f"QEMU did not load its state within {LOAD_S:g} s")


class Migration:
    """Runs one migration on one control socket, whose events must be passed to `on_event`."""

    def __init__(self) -> None:
        self._status = ""
        self._over = trio.Event()

    def on_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "MIGRATION":
            self._status = str(data.get("status"))
            if self._status in _OVER:
                self._over.set()

    async def save(self, qmp: QmpClient, state: Path, timeout_s: float) -> None:
        """Stops the machine and saves its devices. Raises QmpRefused, QmpLost."""
        await await_disconnect(qmp)
        await qmp.execute("stop")
        await qmp.execute("migrate-set-capabilities", _CAPABILITIES)
        await qmp.execute("migrate", {"uri": f"file:{state}"})
        await self._end(qmp, timeout_s, "the machine could not be saved")

    async def load(self, host: Host, spec: MachineSpec, qmp: QmpClient) -> None:
        """Loads a template into a machine that waits for one, which stays paused. Raises QmpRefused, QmpLost; QEMU may
        exit then."""
        assert spec.template is not None
        async with _listening(host, spec, qmp):
            await _begin_loading(qmp, spec.template.state)
            await self._end(qmp, LOAD_S, "the template does not fit")

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
            raise QmpLost(f"QEMU's migration did not end within {timeout_s:g} s: {self._status or 'no event'}")
        info = await qmp.execute("query-migrate")
        text = info.get("error-desc") if isinstance(info, dict) else None
        raise QmpRefused(f"{failure}: {text or self._status}")
