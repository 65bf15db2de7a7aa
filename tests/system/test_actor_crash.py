"""Guests and clients do not notice a crash of a VM's actor.

The daemon runs inside the test, with real guests, so that the test can make an actor fail.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from actors.testing import kill
from tests.names import named
from tests.system.kit import Stopwatch, adopted, boot, is_alive, reachable, run
from volant.client import Client, ClientError, ClientProblem, LogLine
from volant.daemon._daemon import Daemon
from volant.daemon._directories import claimed, remove
from volant.daemon._settings import Settings
from volant.daemon._sockets import address_of, listening
from volant.vm import _actor


@asynccontextmanager
async def daemon_inside(image_cache: Path) -> AsyncIterator[tuple[Daemon, Client]]:
    """Runs an ephemeral daemon in this process."""
    root = Path(tempfile.mkdtemp(prefix="vt", dir="/tmp"))
    settings = Settings(
        api_listen_addr="127.0.0.1:0",
        state_dir=root / "s",
        runtime_dir=root / "r",
        cache_dir=image_cache,
        accelerator="tcg",
        network="none",
        ephemeral=True,
    )
    try:
        with (
            claimed(settings),
            listening(settings) as sockets,
            trio.open_signal_receiver(signal.SIGTERM) as signals,
        ):
            daemon = Daemon(settings, sockets)
            failure: BaseException | None = None
            async with trio.open_nursery() as nursery:
                nursery.start_soon(daemon.run, signals)
                async with Client(address_of(sockets[0])) as client:
                    await adopted(client)
                    try:
                        yield daemon, client
                    except Exception as error:
                        # A cancelled daemon could not delete its VMs, so it has to stop by itself.
                        failure = error
                os.kill(os.getpid(), signal.SIGTERM)
            remove(settings)
            if failure is not None:
                raise failure
        # Fails when anything is left there.
        assert not os.listdir(root)  # noqa: PTH208
    finally:
        shutil.rmtree(root, ignore_errors=True)


async def test_a_vm_outlives_crashes_of_its_actor(image_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with daemon_inside(image_cache) as (daemon, client):
        vm = await boot(client, "demo")
        assert daemon.system is not None
        newest = await client.newest_event()
        writer = "setsid sh -c 'for i in $(seq 1 3000); do echo line $i; done >/dev/console' >/dev/null 2>&1 &"
        lost: list[object] = []

        def on_retry(error: object, delay_s: float) -> None:
            lost.append(error)

        async with client.vms.logs("demo", since=0, streams=["console"], on_retry=on_retry) as log:
            await run(client, "demo", "sh", "-c", writer)

            # The crash interrupts a command and the output of the console.
            with pytest.raises(ClientError):  # noqa: PT012 - the end of the block raises it
                async with client.vms.exec("demo", ["sh", "-c", "echo up; sleep 60"]) as process:
                    assert (await anext(process)).data == b"up\n"
                    kill(daemon.system, "vms/demo")
                    with trio.fail_after(30):
                        await process.wait()
            watch = Stopwatch()
            await reachable(client, "demo")
            print(f"reachable again after {watch.seconds:.3f} s")
            assert await run(client, "demo", "echo", "alive") == "alive\n"

            # A bug in a handler: the command under way is not lost.
            failures: list[int] = []
            effect_of = _actor.effect_of  # type: ignore[attr-defined]

            def fails_once(row: Any) -> Any:
                if not failures:
                    failures.append(1)
                    raise RuntimeError("a bug")
                return effect_of(row)

            monkeypatch.setattr(_actor, "effect_of", fails_once)
            assert (await client.vms.start("demo")).status == "running"
            assert failures
            await reachable(client, "demo")

            lines: list[str] = []
            with trio.fail_after(60):
                while not lines or lines[-1] != "line 3000":
                    item = await log.receive()
                    assert isinstance(item, LogLine)
                    if item.line.startswith("line "):
                        lines.append(item.line)
            assert lines == [f"line {i}" for i in range(1, 3001)]
            assert lost == []

        after = await client.vms.get("demo")
        assert (after.pid, after.status, after.boots, after.reason) == (vm.pid, "running", 1, None)
        assert await client.newest_event() == newest
        assert (await client.healthz()).status == "ok"


@pytest.mark.full
async def test_a_vm_whose_actor_is_given_up_goes_on_and_can_be_recovered(
    image_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with daemon_inside(image_cache) as (daemon, client):
        vm = await boot(client, "demo")
        assert vm.pid is not None
        assert daemon.system is not None
        newest = await client.newest_event()
        with pytest.raises(ClientProblem) as early:
            await client.vms.recover("demo")
        assert early.value.status == 409

        row = daemon.store.projection.get(named("demo"))
        assert row is not None
        with monkeypatch.context() as broken:

            async def on_start(self: _actor.VmActor) -> None:
                raise RuntimeError("it does not start any more")

            broken.setattr(_actor.VmActor, "on_start", on_start)
            kill(daemon.system, "vms/demo")
            with trio.fail_after(30):
                while row is not None and row.reason is None:
                    row = await daemon.store.projection.changed(row.id, row.revision)

        lost = await client.vms.get("demo")
        assert (lost.status, lost.pid) == ("running", vm.pid)
        assert lost.reason is not None
        assert lost.reason.code == "control_lost"
        assert "it does not start any more" in lost.reason.message
        assert is_alive(vm.pid)
        # This causes no event of the VM, and the daemon stays healthy.
        assert await client.newest_event() == newest
        assert (await client.healthz()).status == "ok"

        found = await client.vms.recover("demo")
        assert (found.status, found.pid, found.reason) == ("running", vm.pid, None)
        await reachable(client, "demo")
        assert await run(client, "demo", "echo", "alive") == "alive\n"
        assert await client.newest_event() == newest
