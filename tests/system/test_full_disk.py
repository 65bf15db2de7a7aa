"""A full disk refuses new work and harms nothing that runs; when there is space again, all goes on by itself."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.system.kit import Daemon, adopted, boot, event_of, reachable, run, spec, until
from volant.client import Client, ClientProblem, LogGap, LogLine
from volant.model import Manifest

SIZE_MB = 96
SMALL_DISK = (
    "unshare", "--mount", "--propagation", "private", "sh", "-c",
    'for word; do [ "$before" = --state-dir ] && state=$word; before=$word; done; '
    f'mkdir -p "$state" && mount -t tmpfs -o size={SIZE_MB}m,mode=700 small "$state" && exec "$@"',
    "sh",
)  # fmt: skip
"""The daemon's state lies on a disk of its own, which only its mount namespace has."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")


class SmallDisk:
    """The file system of a daemon's state, seen through its process."""

    def __init__(self, daemon: Daemon, pid: int | None = None) -> None:
        self.path = Path(f"/proc/{pid or daemon.pid}/root{daemon.state_dir}")

    def fill(self) -> None:
        """To the last byte."""
        with (self.path / "ballast").open("ab", buffering=0) as file:
            for piece in (1024 * 1024, 4096, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(piece))
        assert not os.statvfs(self.path).f_bavail

    def make_room(self) -> None:
        (self.path / "ballast").unlink()


async def fill_journal(client: Client) -> ClientProblem:
    """Change things until the last pages that were free are used, and the answer that came then."""
    for number in range(200):
        try:
            await client.plugins.install(Manifest(name=f"filler-{number}", version="1", description="x" * 2000))
        except ClientProblem as problem:
            return problem
    raise AssertionError("the disk is full, and the journal takes everything")


async def test_a_full_disk_stops_new_work_alone_and_is_got_over(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(ephemeral=False, wrapper=SMALL_DISK)
    disk = SmallDisk(daemon)
    async with daemon.client() as client:
        await adopted(client)
        demo = await boot(client, "demo")
        dies = await boot(client, "dies")
        await run(client, "demo", "sh", "-c", "echo before >/dev/console")
        disk.fill()
        problem = await fill_journal(client)
        assert (problem.status, problem.code) == (503, "journal-full")
        assert "is full" in problem.detail
        assert "running VMs go on running" in problem.detail

        # New work is refused, each time anew, and nothing of it is left.
        for attempt in (client.vms.create(spec("new")), client.vms.stop("demo"), client.vms.delete("demo")):
            with pytest.raises(ClientProblem) as refused:
                await attempt
            assert (refused.value.status, refused.value.code) == (503, "journal-full")
        with pytest.raises(ClientProblem) as refused:
            async with client.system.backup():
                pass
        assert (refused.value.status, refused.value.code) == (503, "no-space")

        # What runs goes on, and all can be looked at.
        assert (await client.healthz()).status == "degraded"
        assert "is full" in (await client.system.info())["journal"]["trouble"]
        assert [vm.name for vm in await client.vms.list()] == ["demo", "dies"]
        assert await run(client, "demo", "echo", "alive") == "alive\n"
        async with client.events(after="0") as feed:
            assert (await event_of(feed, "VM_RUNNING", "dies")).vm_id == dies.id
        # More than the log's page can have left: these lines are lost, and nobody is hurt.
        await run(client, "demo", "sh", "-c", "seq 1 600 | sed 's,^,lost ,' >/dev/console")
        # A guest that ends now is not forgotten, although nobody can write it down.
        await run(client, "dies", "sh", "-c", "(sleep 0.2; poweroff -f) >/dev/null 2>&1 &")
        with trio.fail_after(30):
            while "VM dies: the disk" not in daemon.log():  # noqa: ASYNC110 - another process's log
                await trio.sleep(0.05)
        assert daemon.runs

        disk.make_room()
        # By itself, and at once for who asks.
        await adopted(client)
        await until(client, "dies", "stopped", timeout_s=30)
        assert (await client.vms.get("demo")).pid == demo.pid
        newest = await client.newest_event()
        new = await client.vms.create(spec("new"))
        assert new.id == dies.id + 1
        async with client.events(after=newest) as feed:
            await event_of(feed, "VM_CREATED", "new")
        await run(client, "demo", "sh", "-c", "echo after >/dev/console")
        assert await _story(client) == ["before", "gap", "after"]
        async with client.system.backup() as backup:
            assert sum([len(piece) async for piece in backup]) == backup.size
        assert daemon.log().count("Traceback") == 0, daemon.log()


@pytest.fixture
def kept_disk() -> Iterator[subprocess.Popen[bytes]]:
    """A process whose mount namespace keeps a small disk while there is no daemon."""
    with subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "3600"]) as holder:
        try:
            while Path(f"/proc/{holder.pid}/ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink():
                time.sleep(0.01)
            yield holder
        finally:
            holder.kill()


@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_daemon_that_starts_on_a_full_disk_adopts_and_takes_changes_once_there_is_space(
    make_daemon: Callable[..., Daemon], kept_disk: subprocess.Popen[bytes], how: str
) -> None:
    wrapper = (
        "nsenter", f"--mount=/proc/{kept_disk.pid}/ns/mnt", "sh", "-c",
        'for word; do [ "$before" = --state-dir ] && state=$word; before=$word; done; mkdir -p "$state"; '
        f'mountpoint -q "$state" || mount -t tmpfs -o size={SIZE_MB}m,mode=700 small "$state"; exec "$@"',
        "sh",
    )  # fmt: skip
    daemon = make_daemon(ephemeral=False, wrapper=wrapper)
    disk = SmallDisk(daemon, kept_disk.pid)
    async with daemon.client() as client:
        await adopted(client)
        demo = await boot(client, "demo")
        await client.networks.create("lan")
    daemon.kill() if how == "kill" else daemon.stop()
    disk.fill()
    daemon.log_path.write_text("")
    daemon.start()
    async with daemon.client() as client:
        with trio.fail_after(30):
            while (await client.healthz()).status == "starting":  # noqa: ASYNC110 - another process's
                await trio.sleep(0.02)
        # What runs is adopted, and all can be looked at.
        vm = await client.vms.get("demo")
        assert (vm.status, vm.pid) == ("running", demo.pid)
        await reachable(client, "demo")
        assert await run(client, "demo", "echo", "alive") == "alive\n"
        assert [network.name for network in await client.networks.list()] == ["lan"]
        async with client.events(after="0") as feed:
            assert (await event_of(feed, "VM_RUNNING", "demo")).vm_id == demo.id
        # No change is taken, and it is told why.
        for attempt in (client.vms.create(spec("new")), client.networks.create("more"), client.vms.stop("demo")):
            with pytest.raises(ClientProblem) as refused:
                await attempt
            assert (refused.value.status, refused.value.code) == (503, "journal-full")
            assert "is full" in refused.value.detail
        assert (await client.healthz()).status == "degraded"
        disk.make_room()
        await adopted(client)
        await client.networks.create("more")
        assert (await client.vms.verb_and_wait("demo", "stop", ["stopped"], grace_s=0)).outcome == "met"
        await client.networks.remove("more")
        await client.networks.remove("lan")
    assert "Traceback" not in daemon.log()
    assert (disk.path / "volant.db-reserve").stat().st_size == 2**20


async def _story(client: Client) -> list[str]:
    """What the console's log tells, without the kernel's and the lost lines that did get in."""
    story: list[str] = []
    numbers: list[int] = []
    with trio.fail_after(30):
        async with client.vms.logs("demo", since=0, streams=["console"]) as log:
            while "after" not in story:
                item = await log.receive()
                if isinstance(item, LogGap):
                    story.append("gap")
                    continue
                assert isinstance(item, LogLine)
                numbers.append(item.seq)
                if item.line in ("before", "after"):
                    story.append(item.line)
    assert numbers == sorted(set(numbers))
    return story
