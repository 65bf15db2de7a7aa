"""Hostile guests, as any user of the daemon can create them, and their effect on other VMs."""

from __future__ import annotations

import base64
import shutil
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import trio

from tests.files import everything_in
from tests.system.kit import BOOT_S, REPOSITORY, Daemon, Stopwatch, run, spec
from tests.system.rootfs import digest
from volant import images
from volant.client import Client, ClientError, ClientProblem, LogLine
from volant.images._cpio import archive, file
from volant.model import Artifact, Boot, Manifest

TURN_S = 60.0
OTHER = "other"
EVIL = "evil"
IN_THE_GUEST = {
    "console": "yes '' >/dev/console",
    "console-of-zeros": "cat /dev/zero >/dev/console",
    "forks": "bomb() { bomb | bomb & }; bomb; sleep 1000",
    "memory": "while :; do tail /dev/zero; done",
    "processors": "for i in 1 2 3 4 5 6 7 8; do while :; do :; done & done; wait",
}
"""Behaviours of a command instead of an agent; it runs as root, as every command does."""
WRITES = ("line-feeds", "no-text")
"""Behaviour of an agent in the output of a workload."""


def hostile_plugin(directory: Path, cache: Path, *, rootfs: Path | None = None) -> Manifest:
    """Makes a plugin in `directory`, whose initramfs has `hostile_agent.py` in place of the multiplexer."""
    path = directory / "hostile.cpio"
    image = images.find(cache)
    assert image is not None
    shutil.copyfile(image.initramfs, path)
    source = (REPOSITORY / "tests/system/hostile_agent.py").read_bytes()
    with path.open("ab") as handle:
        # The kernel unpacks archives one after the other; each begins at a multiple of four.
        handle.write(bytes(-handle.tell() % 4))
        handle.writelines(archive({"usr/lib/volant/volant/guest/_mux.py": file(source)}))
    disk = None if rootfs is None else Artifact(str(rootfs), digest(rootfs))
    return Manifest(name="hostile", version="1", boot=Boot(initramfs=Artifact(str(path), digest(path)), rootfs=disk))


EVENTS = """
for device in /sys/bus/pci/devices/*; do
    [ $(cat $device/vendor) = 0x1b36 -a $(cat $device/device) = 0x0011 ] || continue
    echo ${device##*/} >/sys/bus/pci/drivers/pvpanic-pci/unbind
    echo 1 >$device/enable
    ln -sf $device/resource0 /run/r
    head -n 1 $device/resource
done
"""


def write_without_end(path: bytes, offset: int, value: int) -> bytes:
    """Returns an x86-64 program that maps a file and writes to one byte of it without end; Python cannot."""
    code = bytes.fromhex(
        "488d3d36000000"  # lea rdi, [rip + path]; the path follows the code
        "be02000000 31d2 b802000000 0f05"  # open(path, O_RDWR)
        "4989c0 31ff be00100000 ba03000000 41ba01000000 4531c9 b809000000 0f05"  # mmap(0, 4096, 3, MAP_SHARED, fd, 0)
    )
    code += b"\xc6\x80" + struct.pack("<IB", offset, value) + b"\xeb\xf7"  # again: mov [rax + offset], value; jmp again
    code += path + b"\0"
    base, start = 0x400000, 64 + 56
    size = start + len(code)
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return head + struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096) + code


async def flood_events(client: Client) -> None:
    """Reports a crash dump to the hypervisor again and again: each report is an event on its control socket."""
    where = int((await run(client, EVIL, "/bin/sh", "-c", EVENTS)).split()[0], 16)
    program = base64.b64encode(write_without_end(b"/run/r", where & 0xFFF, 2)).decode()
    command = f"echo {program} | base64 -d >/run/flood; chmod +x /run/flood; setsid /run/flood >/dev/null 2>&1 &"
    await run(client, EVIL, "/bin/sh", "-c", command)


async def turn(client: Client, behaviour: str) -> None:
    """Makes the guest hostile; returns when it is."""
    if behaviour == "events":
        await flood_events(client)
        return
    if behaviour in IN_THE_GUEST:
        await run(client, EVIL, "/bin/sh", "-c", f"setsid sh -c '{IN_THE_GUEST[behaviour]}' >/dev/null 2>&1 &")
    else:
        # It may be hostile before the command has its answer.
        with suppress(ClientError, ClientProblem):
            await run(client, EVIL, "/bin/sh", "-c", f"echo {behaviour} >/run/hostile")
        async with client.vms.logs(EVIL, since=0, streams=["console"]) as lines:
            with trio.fail_after(TURN_S):
                async for item in lines:
                    if isinstance(item, LogLine) and item.line == f"hostile: {behaviour}":
                        break
    if behaviour in WRITES:
        # First the daemon has to ask the new agent for the output.
        async with client.vms.logs(EVIL, since=0, streams=["stdout"]) as output:
            with trio.fail_after(TURN_S):
                await output.receive()


async def boot_evil(client: Client, **fields: object) -> None:
    waited = await client.vms.create_and_wait(spec(EVIL, plugin="hostile", **fields), timeout_s=BOOT_S)
    assert waited.outcome == "met", waited


@dataclass
class Noticed:
    """The effect on the daemon and on another VM."""

    asked: int = 0
    slowest_s: float = 0.0
    """Seconds of the other VM's slowest answer to a command."""
    slowest_healthz_s: float = 0.0
    grown_mb: float = 0.0
    """Growth of the daemon's resident memory."""
    cpu: float = 0.0
    """The part of a processor that the daemon used."""
    deleted_s: float = 0.0
    disk_mb: float = 0.0
    """Most disk space of the hostile VM's logs and runtime files."""

    def __str__(self) -> str:
        return (
            f"other VM: {self.asked} answers, slowest {self.slowest_s:.2f} s; /healthz slowest "
            f"{self.slowest_healthz_s:.2f} s; daemon: grown by {self.grown_mb:.1f} MiB, {self.cpu:.2f} of a processor; "
            f"deleted in {self.deleted_s:.1f} s; disk {self.disk_mb:.1f} MiB"
        )


@asynccontextmanager
async def noticing(daemon: Daemon, client: Client) -> AsyncIterator[Noticed]:
    """Sends requests to the other VM and the daemon until the block ends."""
    noticed = Noticed()
    before_mb, before_s = daemon.rss_mb(), cpu_seconds(daemon.pid)
    # The logs of deleted VMs are kept for a day.
    taken_before_mb = taken_mb(daemon)

    async def ask() -> None:
        while True:
            watch = Stopwatch()
            assert await run(client, OTHER, "echo", "well", timeout_s=30) == "well\n"
            noticed.slowest_s = max(noticed.slowest_s, watch.seconds)
            noticed.asked += 1
            noticed.grown_mb = max(noticed.grown_mb, daemon.rss_mb() - before_mb)
            noticed.disk_mb = max(noticed.disk_mb, taken_mb(daemon) - taken_before_mb)
            await trio.sleep(0.1)

    async def ask_daemon() -> None:
        async with httpx.AsyncClient(base_url=daemon.base_url, trust_env=False, timeout=30) as http:
            while True:
                watch = Stopwatch()
                assert (await http.get("/healthz")).json() == {"status": "ok"}
                noticed.slowest_healthz_s = max(noticed.slowest_healthz_s, watch.seconds)
                await trio.sleep(0.05)

    watch = Stopwatch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        nursery.start_soon(ask_daemon)
        yield noticed
        noticed.cpu = (cpu_seconds(daemon.pid) - before_s) / watch.seconds
        nursery.cancel_scope.cancel()


async def delete_evil(client: Client, noticed: Noticed) -> None:
    watch = Stopwatch()
    await client.vms.delete(EVIL)
    noticed.deleted_s = watch.seconds


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def taken_mb(daemon: Daemon) -> float:
    """Returns the allocated disk space, without the memory and the disks of VMs."""
    taken = 0
    for directory in (daemon.state_dir / "logs", daemon.runtime_dir):
        for path in everything_in(directory):
            try:
                taken += path.lstat().st_blocks * 512
            except FileNotFoundError:
                pass
    return taken / 1024 / 1024
