"""The daemon never mistakes a process of another local user for one of its own."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from tests.attackers.local_user import NOBODY, PYTHON, needs_root, running, running_code
from volant.daemon._settings import Settings
from volant.daemon.guests import stop_guests
from volant.host import Host, ProcessGone, Sandbox
from volant.hypervisor.qemu import QemuHypervisor
from volant.model import ProcessIdentity
from volant.network._passt import Passt
from volant.vm import instance_of, processes_of_vms

pytestmark = needs_root

VM_USERS = range(70_000, 70_010)
WAITING = "import time; print('ready', flush=True); time.sleep(600)"
ANOTHER_LINE = (
    "import ctypes, time\n"
    "words = open('/proc/self/stat').read().rpartition(')')[2].split()\n"
    "start, end = int(words[45]), int(words[46])\n"
    "ctypes.memset(start, ord('x'), end - start - 1)\n"
    "print('ready', flush=True)\n"
    "time.sleep(600)\n"
)
"""A program that overwrites its own command line, as a hypervisor under an attacker's control can."""


@pytest.fixture
def host() -> Host:
    return Host(users=VM_USERS)


@pytest.fixture
def tag(host: Host) -> str:
    return f"volant-test.{host.random.new_id()}"


async def launched(host: Host, tag: str, root: Path, code: str = WAITING, user: int | None = None) -> ProcessIdentity:
    """Starts a process with a tag and waits until it has printed a line."""
    directory = root / f"{user}.{host.random.new_id()[:8]}"
    await host.files.mkdir(directory)
    if user is not None:
        await host.sandbox.lend_directory(directory, user, [], [root])
    output = directory / "out"
    identity = await host.processes.spawn(
        [PYTHON, "-I", "-c", code, tag],
        tag=tag,
        env={},
        cwd=directory,
        stdout_path=output,
        sandbox=None if user is None else Sandbox(user=user),
    )
    with trio.fail_after(20), host.watches.open(output) as watch:
        while b"ready" not in await host.files.read(output):
            await watch.wait()
    return identity


def gone(host: Host, identity: ProcessIdentity) -> bool:
    try:
        with host.processes.open(identity) as process:
            return process.exited
    except ProcessGone:
        return True


async def test_only_the_launched_process_is_found_and_no_decoy(host: Host, tag: str, root: Path) -> None:
    with running_code(WAITING, tag) as decoy:
        assert await host.processes.find(tag) is None
        ours = await launched(host, tag, root)
        a_vms = await launched(host, tag, root, user=VM_USERS[3])
        assert set(await host.processes.scan(tag)) == {ours, a_vms}
        await host.processes.end_all(tag)
        assert gone(host, ours)
        assert gone(host, a_vms)
        assert decoy.poll() is None


async def test_a_setuid_program_of_others_is_not_found(host: Host, tag: str, root: Path) -> None:
    program = root / "tail"
    shutil.copy("/usr/bin/tail", program)
    program.chmod(0o4755)
    with subprocess.Popen(  # noqa: ASYNC220
        [program, "-f", "/dev/null", tag],
        user=NOBODY.pw_uid,
        group=NOBODY.pw_gid,
        extra_groups=(),
        start_new_session=True,
        stderr=subprocess.DEVNULL,
    ) as decoy:
        try:
            assert await host.processes.find(tag) is None
        finally:
            decoy.kill()


async def test_all_processes_with_a_tag_are_killed(host: Host, tag: str, root: Path) -> None:
    both = [await launched(host, tag, root) for _ in range(2)]
    other = await launched(host, f"{tag}0", root)
    await host.processes.end_all(tag)
    assert [gone(host, each) for each in both] == [True, True]
    assert not gone(host, other)
    await host.processes.end_all(f"{tag}0")


async def test_a_hypervisor_that_hides_its_tag_is_killed_by_its_row(host: Host, tag: str, root: Path) -> None:
    hidden = await launched(host, tag, root, ANOTHER_LINE, user=VM_USERS[1])
    later = Host(users=VM_USERS)
    assert await later.processes.find(tag) is None, "it does carry it"
    await later.processes.end_all(tag, hidden)
    assert gone(host, hidden)


async def test_decoys_use_up_no_vm_ids(host: Host) -> None:
    with running_code(WAITING, "volant-0123456789-999999999999999999.1"):
        assert await processes_of_vms(host, "0123456789") == []


async def test_the_hosts_shutdown_ignores_decoys(root: Path) -> None:
    settings = Settings(state_dir=root / "s", runtime_dir=root / "r", cache_dir=root / "c")
    instance = instance_of(settings.state_dir)
    host = Host(users=VM_USERS)
    with (
        running_code(WAITING, f"volant-{instance}-1.1") as vm,
        running_code(WAITING, f"volant-{instance}-s.0123456789ab") as standby,
        running_code(WAITING, f"volant-{instance}-t.0123456789ab") as template,
    ):
        assert await stop_guests(settings, host, QemuHypervisor(host, settings.cache_dir)) == []
        assert [each.poll() for each in (vm, standby, template)] == [None] * 3


@contextmanager
def passt_as_before(passt: Passt, vm_id: int, *, as_who: int) -> Iterator[subprocess.Popen[str]]:
    """A process with the name of passt's, as the user that root's passt changes to, and its log open if it is root
    that has started it."""
    log = passt.socket(vm_id).with_suffix(".log")
    log.parent.mkdir(mode=0o700, parents=True)
    log.touch(0o600)
    code = f"import os, sys; {'os.open(sys.argv[2], os.O_RDWR); ' if as_who == 0 else ''}os.setuid({NOBODY.pw_uid})\n"
    tag = f"volant-{passt.instance}-n.{vm_id}"
    with running([PYTHON, "-I", "-c", code + WAITING, tag, str(log)], user=as_who) as process:
        yield process


async def test_a_decoy_of_passt_is_ignored(host: Host, root: Path) -> None:
    passt = Passt(host, root / "r", "0123456789")
    with passt_as_before(passt, 7, as_who=NOBODY.pw_uid) as decoy:
        with trio.fail_after(20):
            await passt.ended(7)
            await passt.end(7)
        assert decoy.poll() is None


async def test_a_passt_of_root_is_killed_although_it_runs_as_nobody(host: Host, root: Path) -> None:
    passt = Passt(host, root / "r", "0123456789")
    with passt_as_before(passt, 7, as_who=0) as real:
        with trio.fail_after(20):
            await passt.end(7)
        assert real.wait(10) == -signal.SIGKILL
    assert not host.files.exists(passt.socket(7).with_suffix(".log"))
