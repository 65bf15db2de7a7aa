"""Measures VMs of an OCI image: from `POST /api/v1/vms` to the answer of a first command, `volar run`, and what ten VMs
of one image take of the disk.

The bare script starts QEMU on the image's template, loads its state, resumes it and asks the agent, as in
`_template.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import httpx
import msgspec
import trio

from tests.oci.kit import tar, write_layout
from tests.system.kit import Daemon, cache_dir
from tests.system.rootfs import busybox
from volant.hypervisor import Disk, Template
from volant.oci import disk_path

from ._boot import BOOT_S, _accelerator, _argv, _spec
from ._figure import Figure, Pairs, percentile
from ._first_exec import execute
from ._template import BareClone, until_one_waits
from ._world import CHECKOUT, CODE, Skipped, current_image, scratch, volantd

WARM_MS = 100.0
TO_SCRIPT = 0.3
TO_PLAIN = 1.3
_MEMORY_MB = 128
_REFERENCE = "localhost/bench:1"
_ROUNDS = 15
_COLD = 3
_RUNS = 9
_VMS = 10
_SETTLE_S = 0.3
_LAYER_MB = 32


async def image_first_exec() -> list[Figure]:
    """VMs of an image that boot cold, clone its template, and claim a warm process; and a bare script."""
    image = current_image()
    with scratch() as directory, ExitStack() as stack:
        daemon = stack.enter_context(volantd("--templates", "auto", "--standby", "0"))
        reference = await _image(daemon, directory)
        cold = await _first_execs(daemon, reference, "cold", _COLD)
        for image_or_none in (reference, None):
            await _build_template(daemon, image_or_none)
        spec = stack.enter_context(_spec(image, await _accelerator(daemon)))
        async with daemon.http() as http:
            (view,) = (await http.get("/api/v1/images", params={"reference": reference})).json()
            ready = [each for each in (await http.get("/api/v1/templates")).json() if each["plugin"] == reference]
        template = daemon.state_dir / "templates" / ready[0]["digest"]
        layer = directory / "root.qcow2"
        layer.write_bytes((template / "root.qcow2").read_bytes())
        spec = msgspec.structs.replace(
            spec, root=Disk(None, layer, None, disk_path(cache_dir(), view["digest"])),
            template=Template(template / "memory", template / "state"),
        )  # fmt: skip
        bare = BareClone(spec, await _argv(spec))
        against, scripts = Pairs(), list[float]()
        for _ in range(_ROUNDS):
            await trio.sleep(_SETTLE_S)
            scripts.append(await bare.boot())
            (plain,) = await _first_execs(daemon, None, "template", 1)
            against.add((await _first_execs(daemon, reference, "template", 1))[0], plain)
        daemon.stop()
        warm_daemon = stack.enter_context(volantd("--templates", "auto", "--standby", "1"))
        await _build_template(warm_daemon, reference)
        warm = await _first_execs(warm_daemon, reference, "template", _ROUNDS, warm=True)
        runs = Pairs()
        for _ in range(_RUNS):
            await until_one_waits(warm_daemon)
            runs.add(await _run_true(warm_daemon, reference), _version())
    script_s = median(scripts)
    return [
        Figure("image_first_exec_cold", 1000 * median(cold), "ms", median(cold) / script_s,
               f"a bare script's {1000 * script_s:.3g} ms for a clone"),
        Figure("image_first_exec_template", 1000 * against.value, "ms", against.ratio,
               f"the {1000 * against.other:.3g} ms of a clone without an image; "
               f"p95 {1000 * percentile(against.ours, 95):.3g} ms", at_most=TO_PLAIN),
        Figure("image_first_exec_warm", 1000 * median(warm), "ms", median(warm) / script_s,
               f"the script's; p95 {1000 * percentile(warm, 95):.3g} ms", at_most=TO_SCRIPT, within=WARM_MS),
        Figure("volar_run_true", 1000 * runs.value, "ms", runs.ratio,
               f"the {1000 * runs.other:.3g} ms of volar --version; `volar run --rm IMAGE true`, warm"),
    ]  # fmt: skip


async def image_disk() -> list[Figure]:
    """The disk space of ten VMs of one image, against one VM."""
    current_image()
    with scratch() as directory, ExitStack() as stack:
        daemon = stack.enter_context(volantd("--templates", "auto", "--standby", "0"))
        reference = await _image(daemon, directory, layer_mb=_LAYER_MB)
        used = []
        async with daemon.http() as http:
            for number in range(_VMS):
                await _create(http, f"vm{number}", reference, "auto")
                (view,) = (await http.get("/api/v1/images", params={"reference": reference})).json()
                layers = sum(path.stat().st_blocks * 512 for path in daemon.state_dir.glob("disks/*/*"))
                used.append(view["size_bytes"] + layers)
    return [
        Figure(
            "image_disk", used[-1] / 2**20, "MiB", used[-1] / used[0],
            f"one VM's {used[0] / 2**20:.3g} MiB; {_VMS} VMs of an image of {_LAYER_MB} MiB, which the page cache "
            "has once, too",
        )
    ]  # fmt: skip


async def _image(daemon: Daemon, directory: Path, *, layer_mb: int = 1) -> str:
    """Puts an image into the cache. Returns its reference."""
    links = [(f"bin/{name}", {"to": "busybox"}) for name in ("sh", "true", "cat", "sleep")]
    packages = cache_dir() / "debs"
    if not packages.exists():
        raise Skipped("the boot image was not built here, and BusyBox comes from its packages")
    base = tar(("bin", {}), ("bin/busybox", {"data": busybox(cache_dir()), "mode": 0o755}), *links)
    random = tar(("data", {"data": os.urandom(layer_mb * 2**20)}))
    made = write_layout(directory / "layout", [base, random], Cmd=["/bin/sleep", "1000"], Env=["PATH=/bin"])
    archive = shutil.make_archive(str(directory / "image"), "tar", made.layout)
    data = await trio.Path(archive).read_bytes()
    async with daemon.http() as http:
        answer = await http.put(
            "/api/v1/images/archive", params={"reference": _REFERENCE}, content=data,
            headers={"Content-Type": "application/x-tar"}, timeout=BOOT_S,
        )  # fmt: skip
        answer.raise_for_status()
    return _REFERENCE


async def _build_template(daemon: Daemon, reference: str | None) -> None:
    async with daemon.http() as http:
        await _create(http, "first", reference, "template")
        (await http.delete("/api/v1/vms/first", timeout=BOOT_S)).raise_for_status()


async def _first_execs(
    daemon: Daemon, reference: str | None, boot: str, count: int, *, warm: bool = False
) -> list[float]:
    took = []
    async with daemon.http() as http:
        for _ in range(count):
            if warm:
                await until_one_waits(daemon)
            await trio.sleep(_SETTLE_S)
            began = time.perf_counter()
            await _create(http, "demo", reference, boot)
            await execute(http, "demo")
            took.append(time.perf_counter() - began)
            (await http.delete("/api/v1/vms/demo", timeout=BOOT_S)).raise_for_status()
    return took


async def _create(http: httpx.AsyncClient, name: str, reference: str | None, boot: str) -> None:
    image = {} if reference is None else {"image": reference, "start_workload": False}
    body = {"name": name, **image, "cpu_cores": 1, "memory_mb": _MEMORY_MB, "boot": boot}
    made = await http.post(f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json=body, timeout=BOOT_S)
    if made.headers.get("volant-wait") != "met":
        raise RuntimeError(f"the VM did not come to run: {made.text}")


async def _run_true(daemon: Daemon, reference: str) -> float:
    return await trio.to_thread.run_sync(
        _took, ["--api", daemon.base_url, "run", "--rm", "--memory", f"{_MEMORY_MB}M", reference, "true"]
    )


def _version() -> float:
    return _took(["--version"])


def _took(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "volant.cli.main", *arguments], cwd=CHECKOUT,
        env=os.environ | CODE | {"PYTHONDONTWRITEBYTECODE": ""}, stdout=subprocess.DEVNULL, timeout=BOOT_S, check=True,
    )  # fmt: skip
    return time.perf_counter() - began
