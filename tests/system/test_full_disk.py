"""A full disk stops new work and harms no running VM; when there is space again, the daemon recovers by itself."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.oci.kit import write_layout
from tests.oci.registry import needs_registry
from tests.system.kit import Daemon, adopted, boot, event_of, kill_hypervisor, run, run_cut_off, spec, until
from tests.system.rootfs import busybox_layer
from volant.client import Client, ClientProblem, LogGap, LogLine
from volant.model import Manifest

SIZE_MB = 96


def small_state_disk(size_mb: int) -> tuple[str, ...]:
    """Returns a wrapper that mounts a small disk for the daemon's state, in the daemon's mount namespace."""
    return (
        "unshare", "--mount", "--propagation", "private", "sh", "-c",
        'for word; do [ "$before" = --state-dir ] && state=$word; before=$word; done; '
        f'mkdir -p "$state" && mount -t tmpfs -o size={size_mb}m,mode=700 small "$state" && exec "$@"',
        "sh",
    )  # fmt: skip


pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount"),
    pytest.mark.alone,
]


class SmallDisk:
    """The filesystem of a daemon's state, reached through its process."""

    def __init__(self, daemon: Daemon, pid: int | None = None) -> None:
        self.path = Path(f"/proc/{pid or daemon.pid}/root{daemon.state_dir}")

    def fill(self) -> None:
        """Fills it to the last byte."""
        with (self.path / "ballast").open("ab", buffering=0) as file:
            for piece in (1024 * 1024, 4096, 1):
                with suppress(OSError):
                    while True:
                        file.write(bytes(piece))
        assert not os.statvfs(self.path).f_bavail

    def make_room(self) -> None:
        (self.path / "ballast").unlink()


async def fill_journal(client: Client) -> ClientProblem:
    """Makes changes until the journal is full; returns the error."""
    for number in range(200):
        try:
            await client.plugins.install(Manifest(name=f"filler-{number}", version="1", description="x" * 2000))
        except ClientProblem as problem:
            return problem
    raise AssertionError("the disk is full, and the journal takes everything")


async def test_a_full_disk_stops_only_new_work_and_the_daemon_recovers(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(ephemeral=False, wrapper=small_state_disk(SIZE_MB))
    disk = SmallDisk(daemon)
    async with daemon.client() as client:
        await adopted(client)
        demo = await boot(client, "demo")
        dies = await boot(client, "dies")
        await run(client, "demo", "sh", "-c", "echo before >/dev/console")
        # More than the free rest of the log's last page: lines are lost while the disk is full, without other harm.
        chatter = "while sleep 0.5; do seq 1 100 | sed 's,^,lost ,'; done >/dev/console 2>&1 </dev/null &"
        await run(client, "demo", "sh", "-c", f"{chatter} echo $! >/run/chatter")
        disk.fill()
        problem = await fill_journal(client)
        assert (problem.status, problem.code) == (503, "journal-full")
        assert "is full" in problem.detail
        assert "VMs go on running" in problem.detail

        # New work is refused each time, and leaves nothing behind.
        for attempt in (client.vms.create(spec("new")), client.vms.stop("demo"), client.vms.delete("demo")):
            with pytest.raises(ClientProblem) as refused:
                await attempt
            assert (refused.value.status, refused.value.code) == (503, "journal-full")
        with pytest.raises(ClientProblem) as refused:
            async with client.system.backup():
                pass
        assert (refused.value.status, refused.value.code) == (503, "no-space")

        # Running VMs continue, and everything can be read.
        assert (await client.healthz()).status == "degraded"
        assert "is full" in (await client.system.info())["journal"]["trouble"]
        assert [vm.name for vm in await client.vms.list()] == ["demo", "dies"]
        assert await agent_answers(client, "demo")
        async with client.events(after="0") as feed:
            assert (await event_of(feed, "VM_RUNNING", "dies")).vm_id == dies.id
        # Who reaches into a guest is recorded first, and that can't be.
        with pytest.raises(ClientProblem) as refused:
            await run(client, "demo", "echo", "alive")
        assert (refused.value.status, refused.value.code) == (503, "journal-full")
        # The end of a guest is reported later, although it cannot be written now.
        kill_hypervisor(dies)
        with trio.fail_after(30):
            while not all(part in daemon.log() for part in ("VM dies: the disk", "(demo) loses lines")):  # noqa: ASYNC110
                await trio.sleep(0.05)
        assert daemon.runs

        disk.make_room()
        # The daemon recovers by itself, and at once on a request.
        await adopted(client)
        await until(client, "dies", "crashed", timeout_s=30)
        assert (await client.vms.get("demo")).pid == demo.pid
        newest = await client.newest_event()
        new = await client.vms.create(spec("new"))
        assert new.id == dies.id + 1
        async with client.events(after=newest) as feed:
            await event_of(feed, "VM_CREATED", "new")
        await run(client, "demo", "sh", "-c", "kill $(cat /run/chatter); echo after >/dev/console")
        assert await _story(client) == ["before", "gap", "after"]
        async with client.system.backup() as backup:
            assert sum([len(piece) async for piece in backup]) == backup.size
        assert daemon.log().count("Traceback") == 0, daemon.log()


@needs_registry
async def test_the_disk_of_an_image_on_a_full_host_is_an_error_in_the_guest_and_the_log_says_why(
    make_daemon: Callable[..., Daemon], image_cache: Path, tmp_path: Path
) -> None:
    image = write_layout(tmp_path / "layout", [busybox_layer(image_cache)], Env=["PATH=/bin"])
    # Of which 128 MiB are the daemon's own.
    daemon = make_daemon(ephemeral=False, wrapper=small_state_disk(256))
    async with daemon.client() as client:
        demo = await boot(client, "demo", image=f"oci:{image.layout}:t", start_workload=False)
        SmallDisk(daemon).fill()
        async with client.vms.logs("demo", since=0, streams=["stderr"]) as log:
            await run_cut_off(client, "demo", "cat /dev/zero >/fill; sync")
            with trio.fail_after(30):
                while not isinstance(line := await log.receive(), LogLine) or "No space left" not in line.line:
                    pass
        assert "the host can't write to its disk" in line.line
        SmallDisk(daemon).make_room()
        assert (await client.vms.get("demo")).pid == demo.pid


@pytest.fixture
def kept_disk() -> Iterator[subprocess.Popen[bytes]]:
    """A process that keeps the mount namespace with the small disk while no daemon runs."""
    with subprocess.Popen(["unshare", "--mount", "--propagation", "private", "sleep", "3600"]) as holder:
        try:
            while Path(f"/proc/{holder.pid}/ns/mnt").readlink() == Path("/proc/self/ns/mnt").readlink():
                time.sleep(0.01)
            yield holder
        finally:
            holder.kill()


@pytest.mark.full
@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_a_daemon_that_starts_on_a_full_disk_adopts_and_accepts_changes_once_there_is_space(
    make_daemon: Callable[..., Daemon], kept_disk: subprocess.Popen[bytes], how: str
) -> None:
    wrapper = (
        "nsenter", f"--mount=/proc/{kept_disk.pid}/ns/mnt", "sh", "-c",
        'for word; do [ "$before" = --state-dir ] && state=$word; before=$word; done; mkdir -p "$state"; '
        f'mountpoint -q "$state" || mount -t tmpfs -o size={SIZE_MB}m,mode=700 small "$state"; exec "$@"',
        "sh",
    )  # fmt: skip
    # The default subnet may belong to the daemon of another module's tests.
    daemon = make_daemon(ephemeral=False, wrapper=wrapper, environ={"VOLANT_SUBNET": "10.213.87.0/24"})
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
        # Running VMs are adopted, and everything can be read.
        vm = await client.vms.get("demo")
        assert (vm.status, vm.pid) == ("running", demo.pid)
        with trio.fail_after(60):
            while not await agent_answers(client, "demo"):  # noqa: ASYNC110
                await trio.sleep(0.1)
        assert [network.name for network in await client.networks.list()] == ["lan"]
        async with client.events(after="0") as feed:
            assert (await event_of(feed, "VM_RUNNING", "demo")).vm_id == demo.id
        # Changes are refused, with the reason.
        for attempt in (client.vms.create(spec("new")), client.networks.create("more"), client.vms.stop("demo")):
            with pytest.raises(ClientProblem) as refused:
                await attempt
            assert (refused.value.status, refused.value.code) == (503, "journal-full")
            assert "is full" in refused.value.detail
        assert (await client.healthz()).status == "degraded"
        disk.make_room()
        await adopted(client)
        await client.networks.create("more")
        assert (await client.vms.apply_and_wait("demo", "stop", ["stopped"], grace_s=0)).outcome == "met"
        await client.networks.delete("more")
        await client.networks.delete("lan")
    assert "Traceback" not in daemon.log()
    assert (disk.path / "volant.db-reserve").stat().st_size == 2**20


async def agent_answers(client: Client, vm: str) -> bool:
    """Whether the agent of a VM answers the daemon; asking for that is not recorded."""
    return (await client.vms.memory(vm)).guest is not None


async def _story(client: Client) -> list[str]:
    """Returns the lines of the console's log, without those of the kernel and those that may be lost."""
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
