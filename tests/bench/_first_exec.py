"""Measures the time from `POST /api/v1/vms` to the answer of a first command, and of a second one, in a new VM.

Users feel this time: under emulation code runs slowly when a process executes it for the first time.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from statistics import median

import httpx
import trio

from ._boot import BOOT_S, WANTED
from ._figure import Figure, percentile
from ._template import first_template, until_one_waits
from ._world import volantd

TARGET_MS = 60.0
RUNNING_MS = 25.0
CPU_MS = 10.0
_SETTLE_S = 0.3
_COMMAND = {"command": ["true"]}


async def create_first_exec(rounds: int = 15, cold_rounds: int = 3) -> list[Figure]:
    """VMs that claim a warm process, that are cloned from the template, and that boot cold."""
    figures = []
    for how, standby, boot, count in (
        ("warm", "1", "template", rounds),
        ("template", "0", "template", rounds),
        ("cold", "0", "cold", cold_rounds),
    ):
        creates, firsts, seconds, cpu_ms = [], [], [], []
        with ExitStack() as stack:
            daemon = stack.enter_context(volantd("--templates", "auto", "--standby", standby))
            await first_template(daemon)
            async with daemon.http() as http:
                for number in range(count):
                    if how == "warm":
                        await until_one_waits(daemon)
                    await trio.sleep(_SETTLE_S)
                    body = {
                        "name": f"exec{number}",
                        "cpu_cores": WANTED.cpu_cores,
                        "memory_mb": WANTED.memory_mb,
                        "boot": boot,
                    }
                    cpu_before_ms = _cpu_ms(daemon.pid)
                    began = time.perf_counter()
                    made = await http.post(f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json=body, timeout=BOOT_S)
                    ran = time.perf_counter()
                    cpu_ms.append(_cpu_ms(daemon.pid) - cpu_before_ms)
                    await execute(http, f"exec{number}")
                    answered = time.perf_counter()
                    await execute(http, f"exec{number}")
                    again = time.perf_counter()
                    if made.headers.get("volant-wait") != "met":
                        raise RuntimeError(f"the VM did not come to run: {made.text}")
                    creates.append(ran - began)
                    firsts.append(answered - ran)
                    seconds.append(again - answered)
                    (await http.delete(f"/api/v1/vms/exec{number}", timeout=BOOT_S)).raise_for_status()
        both = [1000 * (create + first) for create, first in zip(creates, firsts, strict=True)]
        figures += [
            Figure(
                f"create_first_exec_{how}", median(both), "ms", within=TARGET_MS if how == "warm" else None,
                to=f"p95 {percentile(both, 95):.3g} ms; {count} VMs",
            ),
            Figure(
                f"create_running_{how}", 1000 * median(creates), "ms", within=RUNNING_MS if how == "warm" else None,
                to=f"p95 {1000 * percentile(creates, 95):.3g} ms",
            ),
            Figure(
                f"daemon_cpu_create_{how}", median(cpu_ms), "ms", within=CPU_MS if how == "warm" else None,
                to=f"of the daemon's processor time until `running`; p95 {percentile(cpu_ms, 95):.3g} ms",
            ),
            Figure(
                f"first_exec_{how}", 1000 * median(firsts), "ms", median(firsts) / median(seconds),
                f"the second one's {1000 * median(seconds):.3g} ms; p95 {1000 * percentile(firsts, 95):.3g} ms",
            ),
        ]  # fmt: skip
    return figures


def _cpu_ms(pid: int) -> float:
    """Returns the processor time of a process so far, that of threads that have ended included."""
    # clock_getcpuclockid(3), which Python has for threads only.
    return 1000 * time.clock_gettime(~pid << 3 | 2)


async def execute(http: httpx.AsyncClient, name: str) -> None:
    """Runs a command in a VM that does nothing. :raises RuntimeError: if it does not run"""
    answer = await http.post(f"/api/v1/vms/{name}/agent/v1/exec", json=_COMMAND, timeout=BOOT_S)
    if answer.status_code != 200 or '"exit_code"' not in answer.text:
        raise RuntimeError(f"no command ran in {name}: {answer.text}")
