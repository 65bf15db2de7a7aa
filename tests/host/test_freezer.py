"""VMs that another host may start are frozen as a whole: real processes in real cgroups of version 2."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.processes import read_line
from volant.daemon._settings import Settings
from volant.daemon.guests import stop_guests
from volant.host import Freezer, FreezerFailed, Host, ResourceLimits, own_cgroups, watchdog_tag
from volant.host._cgroups import group_of, mount_of
from volant.host._watchdog import boottime
from volant.hypervisor.qemu import QemuHypervisor
from volant.model import ProcessIdentity
from volant.vm import instance_of, processes_of_vms

SOON_S = 10.0
BOUNDS = ResourceLimits(memory_mb=640, cpus=3, weight=200, tasks=258)
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or own_cgroups("volant-test-freezer") is None, reason="needs root and cgroups of version 2"
)


class Bed:
    """One host; `daemon` is its daemon, or the next one."""

    def __init__(self, directory: Path, instance: str = "") -> None:
        self.instance = instance or uuid.uuid4().hex[:10]
        self.directory = directory / "freezer"
        found = mount_of(Path("/proc/self/mountinfo").read_text())
        assert found is not None
        self.top = found[0] / f"volant-{self.instance}-movable"
        self.vms = self.top / "vms"
        self._work = directory

    def daemon(self) -> tuple[Host, Freezer]:
        host = Host(groups=own_cgroups(f"volant-{self.instance}"))
        return host, Freezer(host, self.directory, instance=self.instance, scopes=None)

    async def vm(self, host: Host, number: int = 1) -> ProcessIdentity:
        """A process that writes to its log all the time."""
        tag = f"volant-{self.instance}-{number}.1"
        code = "import time\nwhile True: print(1, flush=True); time.sleep(0.01)"
        argv = [sys.executable, "-c", code, tag]
        return await host.processes.spawn(argv, tag=tag, env={}, cwd=self._work, stdout_path=self.log(tag))

    def log(self, tag: str) -> Path:
        return self._work / f"{tag}.log"

    async def runs(self, identity: ProcessIdentity, within_s: float = SOON_S) -> bool:
        """Whether it goes on."""
        log = self.log(identity.tag)
        before = log.stat().st_size
        with trio.move_on_after(within_s):
            while log.stat().st_size == before:  # noqa: ASYNC110 - another process's
                await trio.sleep(0.01)
        return log.stat().st_size != before

    async def stands_still(self, identity: ProcessIdentity) -> bool:
        return not await self.runs(identity, 0.2)

    async def dispose(self) -> None:
        """Removes all, whatever a test has left."""
        host, freezer = self.daemon()
        with trio.fail_after(SOON_S):
            await host.processes.end(await host.processes.scan(f"volant-{self.instance}-"))
            await freezer.close()
            # A process that has ended leaves its group a moment later.
            while self.top.exists():
                await trio.sleep(0.01)
                await freezer.close()


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    bed = Bed(tmp_path)
    yield bed
    await bed.dispose()


async def until_frozen(freezer: Freezer) -> float:
    """Returns when it was seen, by the watchdog's clock."""
    with trio.fail_after(SOON_S):
        while not freezer.is_frozen:  # noqa: ASYNC110 - the kernel's
            await trio.sleep(0.005)
    return boottime()


async def end(host: Host, identity: ProcessIdentity) -> None:
    with trio.fail_after(SOON_S):
        await host.processes.end([identity])


async def test_all_stand_still_at_once_and_so_does_what_comes_later(bed: Bed) -> None:
    host, freezer = bed.daemon()
    await freezer.open()
    assert freezer.watched
    assert freezer.until == 0
    assert freezer.is_frozen, "nothing may run before etcd was asked"
    with pytest.raises(FreezerFailed, match="time is over"):
        await freezer.thaw()
    freezer.last(boottime() + 60)
    one, two = await bed.vm(host, 1), await bed.vm(host, 2)
    assert await bed.runs(one)
    await freezer.enclose(one, "VM one", BOUNDS)
    assert await bed.stands_still(one)
    # What an actor does, at its start and when it adopts.
    await host.limits.apply(one, "VM one", BOUNDS)
    assert group_of(one.pid) == bed.vms / one.tag
    assert await bed.stands_still(one)
    await freezer.thaw()
    assert await bed.runs(one)
    assert not host.limits.is_frozen(one)
    await host.limits.apply(two, "VM two", BOUNDS)
    assert group_of(two.pid) != bed.vms / two.tag
    await freezer.enclose(two, "VM two", None)
    for _ in range(2):
        await freezer.freeze()
        assert await bed.stands_still(one)
        assert await bed.stands_still(two)
    assert host.limits.is_frozen(one)
    limits, events = host.limits.of(one), host.limits.oom_events(one)
    assert limits is not None
    assert set(limits.items()) <= {("memory.max", str(640 * 2**20)), ("pids.max", "258"), ("cpu.weight", "200"),
                                   ("cpu.max", "300000 100000"), ("io.weight", "default 200")}  # fmt: skip
    assert events is None or events.parent == bed.vms / one.tag
    # A frozen process can be ended, and its group goes as any other.
    await end(host, one)
    await host.limits.remove_empty(one.tag)
    assert not (bed.vms / one.tag).exists()
    with pytest.raises(FreezerFailed, match="VM one"):
        await freezer.enclose(one, "VM one", None)
    await end(host, two)
    await host.limits.remove_empty(two.tag)
    assert bed.vms.is_dir(), "else the watchdog would end"


async def test_what_nobody_knows_stays_frozen(bed: Bed) -> None:
    """A database that was put back may lack a VM that runs, and that another host has by now."""
    host, freezer = bed.daemon()
    await freezer.open()
    freezer.last(boottime() + 60)
    known, unknown = await bed.vm(host, 1), await bed.vm(host, 2)
    for identity in (known, unknown):
        await freezer.enclose(identity, "VM", BOUNDS)
    await freezer.thaw({known.tag})
    assert await bed.runs(known)
    assert await bed.stands_still(unknown)
    await freezer.freeze()
    await freezer.thaw({known.tag, unknown.tag})
    assert await bed.runs(unknown)
    for identity in (known, unknown):
        await end(host, identity)


async def test_limits_are_set_where_a_frozen_process_is(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """This kernel may have no controllers for groups, so the call is seen instead of its effect."""
    host, freezer = bed.daemon()
    await freezer.open()
    one = await bed.vm(host)
    await freezer.enclose(one, "VM one", None)
    seen: list[tuple[Path, ResourceLimits]] = []
    monkeypatch.setattr("volant.host._cgroups.limit", lambda group, limits: seen.append((group, limits)))
    await host.limits.apply(one, "VM one", BOUNDS)
    # A daemon that has not opened it yet, or that is in no fleet.
    await bed.daemon()[0].limits.apply(one, "VM one", BOUNDS)
    assert seen == [(bed.vms / one.tag, BOUNDS)] * 2
    assert group_of(one.pid) == bed.vms / one.tag


DAEMON = """
import sys, trio
from pathlib import Path
from tests.host.test_freezer import Bed
from volant.host._watchdog import boottime

async def main():
    bed = Bed(Path(sys.argv[1]), sys.argv[2])
    host, freezer = bed.daemon()
    await freezer.open()
    vm = await bed.vm(host)
    await freezer.enclose(vm, "VM one", None)
    freezer.last(boottime() + 1)
    await freezer.thaw()
    print(freezer.until, flush=True)
    await trio.sleep(60)

trio.run(main)
"""


@contextmanager
def daemon(bed: Bed, directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A daemon that lets its VM run for a second more, and does nothing then."""
    command = [sys.executable, "-c", DAEMON, str(directory), bed.instance]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
async def test_the_watchdog_freezes_what_a_daemon_has_left_and_the_next_one_finds_both(
    bed: Bed, tmp_path: Path, signum: signal.Signals
) -> None:
    host, freezer = bed.daemon()
    with daemon(bed, tmp_path) as process:
        until = float(await trio.to_thread.run_sync(read_line, process))
        process.send_signal(signum)
        [vm] = [each.identity for each in await processes_of_vms(host, bed.instance)]
        # Whatever becomes of its group and its session, the watchdog goes on.
        watchdog = await host.processes.find(watchdog_tag(bed.instance))
        assert watchdog is not None
        assert group_of(watchdog.pid) == bed.top / "watchdog"
        assert os.getsid(watchdog.pid) == watchdog.pid
        await freezer.open()
        assert freezer.until == until, "a start is no beat"
        assert until <= await until_frozen(freezer) < until + SOON_S
        assert await bed.stands_still(vm)
    assert await host.processes.find(watchdog_tag(bed.instance)) == watchdog
    freezer.last(boottime() + 60)
    assert await bed.stands_still(vm), "a beat thaws nothing"
    await freezer.thaw()
    assert await bed.runs(vm)
    await freezer.enclose(vm, "VM one", BOUNDS)
    assert group_of(vm.pid) == bed.vms / vm.tag


async def test_a_watchdog_that_ends_is_replaced(bed: Bed, caplog: pytest.LogCaptureFixture) -> None:
    host, freezer = bed.daemon()
    await freezer.open()
    freezer.last(boottime() + 60)
    await freezer.thaw()
    vm = await bed.vm(host)
    await freezer.enclose(vm, "VM one", None)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(freezer.keep)
        first = second = await host.processes.find(watchdog_tag(bed.instance))
        assert first is not None
        await end(host, first)
        with trio.fail_after(SOON_S):
            while second in (None, first) or not freezer.watched:
                await trio.sleep(0.01)
                second = await host.processes.find(watchdog_tag(bed.instance))
        nursery.cancel_scope.cancel()
    assert "the watchdog of VMs that may move has ended with status -9" in caplog.text
    assert await bed.runs(vm)
    freezer.last(boottime())
    with trio.fail_after(SOON_S):
        await freezer.stopped()
    assert await bed.stands_still(vm)
    # One whose file was removed would watch what nobody writes to.
    [shared] = bed.directory.glob("run-until-*")
    shared.unlink()
    _, other = bed.daemon()
    await other.open()
    assert await host.processes.find(watchdog_tag(bed.instance)) not in (None, second)


async def test_who_leaves_the_fleet_leaves_nothing_behind(bed: Bed) -> None:
    host, freezer = bed.daemon()
    await freezer.close()
    await freezer.open()
    vm = await bed.vm(host)
    await freezer.enclose(vm, "VM one", None)
    watchdog = await host.processes.find(watchdog_tag(bed.instance))
    assert watchdog is not None
    # A daemon without a fleet, after one with one was killed.
    host, freezer = bed.daemon()
    await freezer.close()
    assert await bed.runs(vm)
    assert await host.processes.find(watchdog_tag(bed.instance)) == watchdog
    await freezer.open()
    assert freezer.until == 0, "what it was let run for outside of a fleet counts for nothing in one"
    await until_frozen(freezer)
    await freezer.close()
    assert await bed.runs(vm)
    await end(host, vm)
    await host.limits.remove_empty(vm.tag)
    async with trio.open_nursery() as nursery:
        # The daemon goes on with both.
        nursery.start_soon(freezer.keep)
        nursery.start_soon(freezer.stopped)
        await trio.testing.wait_all_tasks_blocked()
        await freezer.close()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert not bed.top.exists()
    assert not bed.directory.exists()
    assert await host.processes.scan(f"volant-{bed.instance}-") == []
    # It may join again.
    await freezer.open()
    assert freezer.is_frozen
    assert freezer.until == 0


async def test_the_hosts_shutdown_kills_frozen_guests_and_no_watchdog(tmp_path: Path) -> None:
    settings = Settings(state_dir=tmp_path / "s", runtime_dir=tmp_path / "r", cache_dir=tmp_path / "c")
    bed = Bed(tmp_path, instance_of(settings.state_dir))
    host, freezer = bed.daemon()
    try:
        await freezer.open()
        vm = await bed.vm(host)
        await freezer.enclose(vm, "VM one", None)
        with trio.fail_after(SOON_S):
            # It can't be asked, and is not waited for.
            assert await stop_guests(settings, host, QemuHypervisor(host, settings.cache_dir)) == []
        assert await processes_of_vms(host, bed.instance) == []
        assert await host.processes.find(watchdog_tag(bed.instance)) is not None
    finally:
        await bed.dispose()


async def test_what_others_have_made_is_not_trusted(bed: Bed, tmp_path: Path) -> None:
    host, freezer = bed.daemon()
    shared = bed.directory / f"run-until-{host.processes.boot_id()}"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    bed.directory.symlink_to(elsewhere)
    with pytest.raises(FreezerFailed, match="symbolic link"):
        await freezer.open()
    bed.directory.unlink()
    bed.directory.mkdir()
    os.chown(bed.directory, 65534, 65534)
    with pytest.raises(FreezerFailed, match="belongs to the user"):
        await freezer.open()
    os.chown(bed.directory, 0, 0)
    shared.symlink_to(elsewhere / "file")
    with pytest.raises(FreezerFailed, match="remove it"):
        await freezer.open()
    shared.unlink()
    for mode, owner in ((0o600, 65534), (0o666, 0)):
        shared.write_bytes(bytes(16))
        shared.chmod(mode)
        os.chown(shared, owner, owner)
        with pytest.raises(FreezerFailed, match="other users"):
            await freezer.open()
        shared.unlink()
    assert not bed.top.exists()
    before = bed.directory / "run-until-another-boot"
    before.touch()
    await freezer.open()
    assert not before.exists()
    assert list(elsewhere.iterdir()) == []
    await freezer.close()
    bed.top.mkdir()
    os.chown(bed.top, 65534, 65534)
    with pytest.raises(FreezerFailed, match="other users"):
        await freezer.open()
    bed.top.rmdir()


async def test_a_host_that_can_freeze_nothing_says_why(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    _, freezer = bed.daemon()
    monkeypatch.setattr("volant.host._cgroups.mount_of", lambda _mountinfo: None)
    with pytest.raises(FreezerFailed, match="version 2"):
        await freezer.open()
    await freezer.close()
    monkeypatch.setattr("volant.host._cgroups.mount_of", lambda _mountinfo: (Path("/proc"), "/"))
    with pytest.raises(FreezerFailed, match="/proc/volant"):
        await freezer.open()
    monkeypatch.undo()
