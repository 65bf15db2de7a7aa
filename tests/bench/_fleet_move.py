"""Measures how long a VM is away that moves because its host is drained, beside QEMU's own migration.

Two hosts on one machine give each other the VM in turns. A client that runs one command after the other in it, through
the host that it comes to, sees how long there is no answer. QEMU's migration has two processes with the same machine,
over TCP and without a limit of bandwidth; there is no disk, and no other host that has to agree.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from statistics import median

import httpx
import trio

from tests.fleet.hosts import fleet
from tests.ports import free_port
from volant.host import PROGRAM_ENVIRONMENT, Host
from volant.hypervisor import MachineSpec
from volant.hypervisor.qemu._qmp import QmpClient, connect_control
from volant.model import CreateVm

from ._boot import BOOT_S, Bare, _accelerator, _argv, _spec, scratch_of
from ._figure import Figure
from ._first_exec import execute
from ._template import first_template
from ._world import current_image, kill_group, scratch, start_program

_VM = CreateVm(name="moves", cpu_cores=1, memory_mb=256)
_AGAIN_S = 0.1
"""Each try costs both daemons some milliseconds of a processor."""
_LOOK_S = 0.02
_SETTLE_S = 1.0
_MOVE_S = 60.0


async def fleet_move(rounds: int = 4) -> list[Figure]:
    """Moves a VM of 256 MiB to and fro, and has QEMU migrate one."""
    image = current_image()
    away_s: list[float] = []
    with scratch() as directory, fleet(directory, "h1", "h2", flags=("--templates", "auto")) as found:
        await found.cluster.ready()
        await found.up()
        for host in found.hosts:
            # The chunks of a template that both have are not copied.
            await first_template(host.daemon, host.name)
        accelerator = await _accelerator(found["h1"].daemon)
        source, target = found.hosts
        body = {"name": _VM.name, "cpu_cores": _VM.cpu_cores, "memory_mb": _VM.memory_mb, "boot": "cold"}
        async with source.http() as http:
            made = await http.post(
                f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json=body, headers={"Volant-Host": source.name}
            )
            made.raise_for_status()
        for _ in range(rounds):
            async with target.http() as http:
                away_s.append(await _move_s(http, source.name, target.name))
            source, target = target, source
    migrations = []
    for _ in range(rounds):
        with ExitStack() as stack:
            specs = [stack.enter_context(_spec(image, accelerator, _VM)) for _ in range(2)]
            migrations.append(await _migrate(*specs))
    down_ms, total_ms = (median(each[name] for each in migrations) for name in ("downtime", "total-time"))
    return [
        Figure(
            "fleet_move", median(away_s), "s",
            to=f"without an answer of its guest; QEMU's own migration takes {total_ms / 1000:.3g} s, of which its "
            f"guest is paused for {down_ms:.3g} ms; {accelerator}",
        )
    ]  # fmt: skip


async def _move_s(http: httpx.AsyncClient, source: str, target: str) -> float:
    """Drains a host; returns the longest time between two answers of the VM on its way to the other one."""
    await execute(http, _VM.name)
    (await http.post(f"/api/v1/hosts/{source}/drain")).raise_for_status()
    answered = time.perf_counter()
    longest_s = 0.0
    with trio.fail_after(_MOVE_S):
        while True:
            with suppress(RuntimeError):
                # It is refused while the VM is paused.
                await execute(http, _VM.name)
                longest_s = max(longest_s, time.perf_counter() - answered)
                answered = time.perf_counter()
                if (await http.get(f"/api/v1/vms/{_VM.name}")).headers["Volant-Host"] == target:
                    break
            await trio.sleep(_AGAIN_S)
        (await http.post(f"/api/v1/hosts/{source}/undrain")).raise_for_status()
        await trio.sleep(_SETTLE_S)
    return longest_s


async def _migrate(source: MachineSpec, target: MachineSpec) -> dict[str, float]:
    """Returns what QEMU says of a migration between two of its processes, in milliseconds."""
    uri = {"uri": f"tcp:127.0.0.1:{free_port()}"}
    with scratch_of(source), scratch_of(target):
        waits = [*await _argv(target), "-incoming", "defer"]
        async with Bare(source, await _argv(source)).running():
            process = start_program(waits, target.directory, target.log_path, PROGRAM_ENVIRONMENT)
            try:
                async with _control(source) as from_here, _control(target) as to_there:
                    await to_there.execute("migrate-incoming", uri)
                    await from_here.execute("migrate-set-parameters", {"max-bandwidth": 0})
                    await from_here.execute("migrate", uri)
                    return await _migrated(from_here)
            finally:
                kill_group(process)


@asynccontextmanager
async def _control(spec: MachineSpec) -> AsyncIterator[QmpClient]:
    host = Host()
    async with await connect_control(host, spec.control_path, BOOT_S) as stream, trio.open_nursery() as nursery:
        qmp = QmpClient(stream, lambda name, data: None, host.random)
        await nursery.start(qmp.start)
        yield qmp
        nursery.cancel_scope.cancel()


async def _migrated(qmp: QmpClient) -> dict[str, float]:
    """Waits until a migration is over; returns what QEMU says of it."""
    with trio.fail_after(_MOVE_S):
        while True:
            said = await qmp.execute("query-migrate")
            found = said if isinstance(said, dict) else {}
            if found.get("status") == "failed":
                raise RuntimeError(f"QEMU has not migrated it: {found.get('error-desc')}")
            if found.get("status") == "completed":
                return found
            await trio.sleep(_LOOK_S)
