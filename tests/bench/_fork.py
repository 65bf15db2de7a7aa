"""Measures a fork of a VM with a running Chromium until DevTools in the copy answers: by the daemon, and by a script.

Both originals are clones of one template, in which the agent has started the same Chromium, so that both have about the
same amount of private memory. The script (`_bare_fork.py`) leaves out identities and error handling.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import msgspec
import trio

from tests.system.kit import REPOSITORY, cache_dir
from volant.channel import AgentClient, VirtioSerial, open_channel
from volant.host import Host
from volant.hypervisor import Disk, MachineSpec, Template
from volant.model import CreateVm, Manifest
from volant.model.agent import DAEMON_MANIFEST, DAEMON_WORKLOAD
from volant.vm._machine_spec import guest_manifest, workload_spec

from ._bare_fork import fork
from ._boot import BOOT_S, _accelerator, _argv, _spec, row_of, scratch_of
from ._clones import pss_mb
from ._figure import Figure, Pairs, percentile
from ._template import BareClone
from ._world import Skipped, current_image, kill_group, scratch, volantd

COPIES = 10
TARGET = 1.5
WITHIN_S = 1.0

_PLUGIN_S = 600.0
_BROWSER_S = 120.0
_AGAIN_S = 0.25
_LOOK_AGAIN_S = 0.005
_SETTLE_S = 1.0
_CALM_S = 5.0
"""Seconds for Chromium to settle after its start."""
_QUESTION = b"GET /json/version HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def fork_chromium(pairs: int = 5) -> list[Figure]:
    """Forks of a browser by the daemon and by the script in turns, and ten at once."""
    image = current_image()
    manifest = _browser()
    wanted = CreateVm(name="web", plugin="browser", cpu_cores=2, memory_mb=1024)
    took, paused_ms, bare_paused_ms = Pairs(), [], []
    with ExitStack() as stack:
        daemon = stack.enter_context(volantd("--templates", "auto"))
        accelerator = await _accelerator(daemon)
        async with daemon.http() as http:
            (await http.post("/api/v1/plugins", json=msgspec.to_builtins(manifest))).raise_for_status()
            built = await http.post("/api/v1/templates", json={"plugin": "browser"}, timeout=2 * BOOT_S)
            template = daemon.state_dir / "templates" / str(built.raise_for_status().json()["digest"])
            spec = stack.enter_context(_spec(image, accelerator, wanted, manifest))
            async with BareOriginal(spec, await _argv(_clone_of(spec, template)), template, manifest).up() as bare:
                made = await http.post(
                    f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json={**_body(wanted), "boot": "template"},
                    timeout=2 * BOOT_S,
                )  # fmt: skip
                _check(made, 1)
                await _answered(http, "web", _BROWSER_S)
                await trio.sleep(_CALM_S)
                for _ in range(pairs):
                    await trio.sleep(_SETTLE_S)
                    by_hand, stood_still_ms = await bare.fork()
                    bare_paused_ms.append(stood_still_ms)
                    await trio.sleep(_SETTLE_S)
                    seconds, (copy,) = await _fork(http, 1)
                    took.add(seconds, by_hand)
                    paused_ms.append(copy["origin"]["paused_ms"])
                    await _delete(http, [copy])
            await trio.sleep(_SETTLE_S)
            ten_s, copies = await _fork(http, COPIES)
            pss = [pss_mb(copy["pid"]) for copy in copies]
            await _delete(http, copies)
    return [
        Figure(
            "fork_chromium", took.value, "s", took.ratio,
            f"a bare script's {took.other:.3g} s for the same, {pairs} pairs, p95 {percentile(took.ours, 95):.3g} s",
            at_most=TARGET, within=WITHIN_S,
        ),
        Figure(
            "fork_chromium_paused", median(paused_ms), "ms", median(paused_ms) / median(bare_paused_ms),
            f"the script's; the pause of the original, p95 {percentile(paused_ms, 95):.3g} ms",
        ),
        Figure(
            f"fork_chromium_{COPIES}", ten_s, "s", ten_s / took.value,
            f"one; until DevTools in all {COPIES} has answered, each with {median(pss):.0f} MiB (PSS)",
        ),
    ]  # fmt: skip


class BareOriginal(BareClone):
    """Clones with the script, starts Chromium in the clone, then disconnects from its agent."""

    def __init__(self, spec: MachineSpec, argv: list[str], template: Path, manifest: Manifest) -> None:
        super().__init__(_clone_of(spec, template), argv)
        self._layer = template / "root.qcow2"
        self._manifest = manifest
        self._pid = 0

    @asynccontextmanager
    async def up(self) -> AsyncIterator[BareOriginal]:
        """Runs it until the block ends."""
        spec = self._spec
        with scratch_of(spec):
            _copy(self._layer, spec.root)
            async with self.running() as process:
                row = row_of(CreateVm(name="web", plugin="browser", cpu_cores=2, memory_mb=1024), self._manifest)
                async with open_channel(Host(), VirtioSerial(spec.agent_path)) as channel:
                    client = AgentClient(channel)
                    for path, body in ((DAEMON_MANIFEST, guest_manifest(row)), (DAEMON_WORKLOAD, workload_spec(row))):
                        answer = await client.request_json("PUT", path, body, timeout_s=BOOT_S)
                        if answer.status >= 300:
                            raise RuntimeError(f"the bare guest answers PUT {path} with {answer}")
                    await _ask_devtools(client, self._manifest, _BROWSER_S)
                await trio.sleep(_CALM_S)
                self._pid = process.pid
                yield self

    async def fork(self) -> tuple[float, float]:
        """Returns the seconds until DevTools in a copy answered, and the milliseconds of the guest's pause."""
        with _room_for_copy(self._spec) as copy, scratch_of(copy):
            argv = await _argv(copy)
            began = time.perf_counter()
            process, paused_s = fork(self._spec, self._pid, copy, argv)
            try:
                async with open_channel(Host(), VirtioSerial(copy.agent_path)) as channel:
                    await _ask_devtools(AgentClient(channel), self._manifest, BOOT_S)
                return time.perf_counter() - began, 1000 * paused_s
            finally:
                kill_group(process)


def _clone_of(spec: MachineSpec, template: Path) -> MachineSpec:
    return msgspec.structs.replace(spec, template=Template(template / "memory", template / "state"))


def _copy(layer: Path, disk: Disk | None) -> None:
    assert disk is not None
    disk.layer.parent.mkdir(exist_ok=True)
    disk.layer.write_bytes(layer.read_bytes())


@contextmanager
def _room_for_copy(origin: MachineSpec) -> Iterator[MachineSpec]:
    """Returns the spec of a copy, with its own directories, in memory as the daemon's checkpoints."""
    assert origin.root is not None
    with scratch() as directory, scratch("/dev/shm") as memory:
        (directory / "vm").mkdir(mode=0o700)
        yield msgspec.structs.replace(
            origin,
            directory=directory / "vm",
            memory_file=memory / "none",
            template=Template(memory / "memory", memory / "state"),
            root=Disk(origin.root.base, directory / "root.qcow2"),
        )


def _browser() -> Manifest:
    """Returns the plugin of `examples/browser`, and builds it if needed. :raises Skipped: if that fails"""
    output = cache_dir() / "browser"
    build = [sys.executable, str(REPOSITORY / "examples/browser/build.py"), "--output", str(output)]
    done = subprocess.run(
        build, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        timeout=_PLUGIN_S, check=False,
    )  # fmt: skip
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Skipped(f"there is no browser to fork: {last[0] if last else 'its builder said nothing'}")
    return msgspec.json.decode((output / "manifest.json").read_bytes(), type=Manifest)


def _body(wanted: CreateVm) -> dict[str, Any]:
    return {
        "name": wanted.name,
        "plugin": wanted.plugin,
        "cpu_cores": wanted.cpu_cores,
        "memory_mb": wanted.memory_mb,
    }


def _check(answer: httpx.Response, count: int) -> list[dict[str, Any]]:
    """Returns the VMs of an answer. :raises RuntimeError: if one does not run"""
    said = answer.json()
    vms: list[dict[str, Any]] = said if isinstance(said, list) else [said]
    if answer.headers.get("volant-wait") != "met" or len(vms) != count:
        raise RuntimeError(f"not all VMs run: {answer.text}")
    return vms


async def _answered(http: httpx.AsyncClient, name: str, timeout_s: float, again_s: float = _AGAIN_S) -> None:
    """Waits until DevTools in a VM has answered."""
    with trio.fail_after(timeout_s):
        while True:
            answer = await http.get(f"/ws/v1/vms/{name}/devtools/json/version", timeout=timeout_s)
            if answer.status_code == 200:
                return
            await trio.sleep(again_s)


async def _fork(http: httpx.AsyncClient, count: int) -> tuple[float, list[dict[str, Any]]]:
    """Forks `count` copies; returns the seconds until DevTools in each answered, and the copies."""
    began = time.perf_counter()
    answer = await http.post(
        f"/api/v1/vms/web/fork?wait=running&timeout={BOOT_S:.0f}s", json={"count": count}, timeout=2 * BOOT_S
    )
    copies = _check(answer, count)
    async with trio.open_nursery() as nursery:
        for copy in copies:
            nursery.start_soon(_answered, http, copy["name"], BOOT_S, _LOOK_AGAIN_S)
    return time.perf_counter() - began, copies


async def _delete(http: httpx.AsyncClient, vms: list[dict[str, Any]]) -> None:
    for vm in vms:
        (await http.delete(f"/api/v1/vms/{vm['name']}", timeout=BOOT_S)).raise_for_status()


async def _ask_devtools(client: AgentClient, manifest: Manifest, timeout_s: float) -> None:
    """Waits until DevTools in the guest has answered through its agent."""
    assert manifest.devtools is not None
    with trio.fail_after(timeout_s):
        while True:
            async with client.stream("CONNECT", f"127.0.0.1:{manifest.devtools.port}", timeout_s=timeout_s) as response:
                if response.switched:
                    stream = response.upgraded()
                    await stream.send_all(_QUESTION)
                    if (await stream.receive_some()).startswith(b"HTTP/1.1 200"):
                        return
            await trio.sleep(_AGAIN_S)
