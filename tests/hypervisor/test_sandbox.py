"""An attacker who controls a hypervisor's process reaches nothing but its own VM.

Guests run in the sandbox that a daemon prepares. The tests start an intruder in the same sandbox, in QEMU's place.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import msgspec
import pytest
import trio

from tests.hypervisor.intruder import DENIED, NOT_RESERVED, PYTHON, tries
from tests.hypervisor.kit import passable_directory, real_qemu, tiny_spec
from tests.hypervisor.test_checkpoint import COUNTS, clone, nobody
from volant.host import Host, ProcessStatus, _procfs
from volant.hypervisor import Disk, MachineSpec, Nic, Template
from volant.hypervisor.qemu import QemuHypervisor, SandboxPlan, _sandbox as qemu_sandbox, user_of
from volant.hypervisor.qemu._launch import prepare_files
from volant.hypervisor.qemu._sandbox import QemuSandbox
from volant.model import ProcessIdentity

pytestmark = pytest.mark.programs

USERS = range(65536, 65536 + 32768)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="users of their own are given by root")


@pytest.fixture
def place() -> Iterator[Path]:
    """The place of a daemon's directories."""
    with passable_directory() as path:
        yield path


@pytest.fixture
def spec(host: Host, place: Path) -> MachineSpec:
    (place / "cache").mkdir(mode=0o700)
    spec = tiny_spec(host, place / "cache", COUNTS)
    return msgspec.structs.replace(spec, directory=place / "r" / "vms" / "7")


@pytest.fixture
def plan(host: Host, place: Path, spec: MachineSpec) -> SandboxPlan:
    """Every layer of the sandbox that this machine supports, as the daemon detects it."""
    memory = spec.memory_file.parent
    memory.mkdir(mode=0o700)
    support = host.sandbox.support([place])
    assert support is not None
    return SandboxPlan(
        places=(place, memory),
        landlock=support.landlock,
        no_connect=support.no_connect,
        users=USERS if support.no_users is None else None,
        no_users=support.no_users,
    )


@pytest.fixture
async def qemu(host: Host, place: Path, spec: MachineSpec, plan: SandboxPlan) -> AsyncIterator[QemuHypervisor]:
    async with real_qemu(host, spec, place / "cache"):
        yield QemuHypervisor(host, place / "cache", accelerator="tcg", sandbox=plan)


def status(host: Host, identity: ProcessIdentity) -> ProcessStatus:
    found = host.proc.status(identity)
    assert found.capabilities == 0
    assert found.no_new_privileges
    assert found.filters >= 1
    return found


async def test_a_guest_runs_is_saved_and_copied_in_the_sandbox(
    host: Host, qemu: QemuHypervisor, plan: SandboxPlan, spec: MachineSpec, place: Path
) -> None:
    """A hypervisor can open all that it needs: memory, disk, console, sockets, states, templates."""
    base = place / "cache" / "base.img"
    base.write_bytes(bytes(2**20))
    base.chmod(0o400)
    (place / "disks" / "7").mkdir(parents=True, mode=0o700)
    disk = Disk(base, place / "disks" / "7" / "root.qcow2")
    cold = msgspec.structs.replace(spec, root=disk)
    with trio.fail_after(120):
        await qemu.make_layer(disk)
        identity = await qemu.launch(cold)
        if plan.users is not None:
            assert status(host, identity).user == user_of(plan.users, cold.tag, 7)
            assert cold.memory_file.stat().st_uid == os.geteuid()
        else:
            status(host, identity)
        into = spec.memory_file.parent / "fork-1"
        into.mkdir(mode=0o700)
        async with qemu.attach(cold, identity) as machine:
            checkpoint = await machine.checkpoint(into, hold=nobody)
            assert await machine.status() == "running"
            saved = place / "templates" / "t1"
            saved.mkdir(parents=True, mode=0o700)
            await machine.save(saved / "state")
            await machine.quit()
        shutil.copy(cold.memory_file, saved / "memory")
        shutil.copy(disk.layer, saved / "root.qcow2")
        sources = [
            (checkpoint.template, checkpoint.layer),
            (Template(saved / "memory", saved / "state"), saved / "root.qcow2"),
        ]
        for number, (template, layer) in enumerate(sources):
            (place / "disks" / f"c{number}").mkdir(mode=0o700)
            own = Disk(base, place / "disks" / f"c{number}" / "root.qcow2")
            await qemu.make_layer(own, layer)
            # A warm process has no VM id yet.
            copy = clone(cold, f"c{number}", template, root=own, vm_id=number * 9)
            copied = await qemu.launch(copy)
            if plan.users is not None:
                assert status(host, copied).user in plan.users
                assert status(host, copied).user != user_of(plan.users, cold.tag, 7)
            async with qemu.attach(copy, copied) as machine:
                assert await machine.status() == "running"
                again = spec.memory_file.parent / f"again{number}"
                again.mkdir(mode=0o700)
                assert (await machine.checkpoint(again, hold=nobody)).memory_bytes > 0
                assert (await host.process_memory.usage(copied, 5)).pss_kb > 0
                assert host.proc.working_directory(copied) == copy.directory
                await machine.kill()


class Intruder:
    """Runs in the place of a machine's QEMU, in its sandbox."""

    def __init__(self, host: Host, plan: SandboxPlan, spec: MachineSpec) -> None:
        self.host = host
        self.plan = plan
        self.spec = spec
        self.status: ProcessStatus | None = None

    async def tries(self, tasks: Sequence[Sequence[object]]) -> dict[tuple[object, ...], str]:
        """Returns the result of each task."""
        sandbox = await QemuSandbox(self.host, self.plan).prepare(self.spec)
        found, self.status = await tries(self.host, self.spec.tag, self.spec.directory, sandbox, tasks)
        return found


@pytest.fixture
async def intruder(host: Host, plan: SandboxPlan, spec: MachineSpec, qemu: QemuHypervisor) -> Intruder:
    if PYTHON is None:
        pytest.skip("there is no Python where programs lie")
    await prepare_files(host, spec)
    return Intruder(host, plan, spec)


@pytest.fixture
def other(host: Host, spec: MachineSpec) -> MachineSpec:
    return msgspec.structs.replace(
        spec,
        vm_id=8,
        directory=spec.directory.with_name("8"),
        memory_file=spec.memory_file.with_name("8.mem"),
        tag=f"{spec.tag}8",
    )


async def test_an_intruder_uses_its_own_files_and_no_others(
    host: Host, plan: SandboxPlan, spec: MachineSpec, other: MachineSpec, qemu: QemuHypervisor, intruder: Intruder,
    place: Path,
) -> None:  # fmt: skip
    database = place / "volant.db"
    database.write_bytes(b"rows")
    database.chmod(0o600)
    template = place / "templates" / "t"
    template.mkdir(parents=True)
    for name in ("memory", "state"):
        (template / name).write_bytes(b"x")
        (template / name).chmod(0o600)
    with trio.fail_after(60):
        victim = await qemu.launch(other)
        its = other.directory
        may = [
            *(("read", str(path)) for path in (spec.kernel, spec.initramfs, spec.memory_file)),
            *(("append", str(path)) for path in (spec.memory_file, spec.console_path)),
            ("bind", "own.sock"), ("stream pair",), ("punch", "console.log"),
        ]  # fmt: skip
        may_not = [
            *(("write", str(path)) for path in (spec.kernel, spec.initramfs)),
            *(("read", str(path)) for path in (other.memory_file, its / "console.log", its / "qemu.log", database)),
            *(("append", str(path)) for path in (other.memory_file, its / "console.log", database)),
            *(("list", str(path)) for path in (place, spec.directory.parent, its, "/root", "/proc", "/tmp", "/etc")),
            *((what, str(template / "memory")) for what in ("read", "write", "chmod", "remove")),
            *(("unix", str(its / name)) for name in ("qmp.sock", "agent.sock")),
            *(("read", path) for path in ("/etc/passwd", "/proc/1/environ", f"/proc/{victim.pid}/cmdline")),
            # In its own directory it can replace nothing by a link that the daemon would follow.
            *((what, "console.log") for what in ("remove", "rename")),
            ("make", "new"), ("link", "console.sock"), ("chmod", "console.log"),
        ]  # fmt: skip
        reserves = [("reserve", "console.log"), ("zero", "console.log"), ("reserve", str(spec.memory_file))]
        found = await intruder.tries([*may, *may_not, *reserves])
    assert {task: found[task] for task in may} == dict.fromkeys(may, "DONE")
    assert {task: result for task in may_not if (result := found[task]) not in DENIED} == {}
    # Beyond the end of a file nobody sees what it takes.
    assert {task: found[task] for task in reserves} == dict.fromkeys(reserves, NOT_RESERVED)


@as_root
async def test_without_landlock_the_user_denies_the_same(
    host: Host, plan: SandboxPlan, spec: MachineSpec, other: MachineSpec, qemu: QemuHypervisor, intruder: Intruder,
    place: Path,
) -> None:  # fmt: skip
    """Older kernels have no Landlock."""
    intruder.plan = msgspec.structs.replace(plan, landlock=0, no_connect=False)
    database = place / "volant.db"
    database.write_bytes(b"rows")
    database.chmod(0o600)
    with trio.fail_after(60):
        victim = await qemu.launch(other)
        its = other.directory
        may = [("read", str(spec.memory_file)), ("append", "console.log"), ("bind", "own.sock"), ("make", "new")]
        may_not = [
            *(("read", str(path)) for path in (other.memory_file, its / "console.log", database)),
            *(("append", str(path)) for path in (other.memory_file, its / "console.log", database)),
            *(("list", str(path)) for path in (place, spec.directory.parent, its)),
            *(("unix", str(its / name)) for name in ("qmp.sock", "agent.sock")),
            *((what, "console.log") for what in ("remove", "rename", "chmod")),
            ("kill", victim.pid), ("ptrace", victim.pid), ("read", f"/proc/{victim.pid}/mem"),
            ("kill", os.getpid()), ("setuid",), ("chroot",), ("mount",),
        ]  # fmt: skip
        found = await intruder.tries([*may, *may_not])
    assert {task: found[task] for task in may} == dict.fromkeys(may, "DONE")
    assert {task: result for task in may_not if (result := found[task]) not in DENIED} == {}


async def test_without_a_separate_user_landlock_isolates_vms(
    plan: SandboxPlan, other: MachineSpec, qemu: QemuHypervisor, intruder: Intruder
) -> None:
    """As with a daemon that is not root: all hypervisors have the same user."""
    intruder.plan = msgspec.structs.replace(plan, users=None)
    if not plan.landlock:
        pytest.skip("the kernel has no Landlock")
    with trio.fail_after(60):
        victim = await qemu.launch(other)
        tasks = [
            *(("append", str(path)) for path in (other.memory_file, other.directory / "console.log")),
            *(("unix", str(other.directory / name)) for name in ("qmp.sock", "agent.sock")),
            ("list", str(other.directory)), ("kill", victim.pid), ("ptrace", victim.pid), ("kill", os.getppid()),
            ("read", f"/proc/{victim.pid}/mem"),
        ]  # fmt: skip
        found = await intruder.tries(tasks)
    assert {task: result for task, result in found.items() if result not in DENIED} == {}
    assert intruder.status is not None
    assert (intruder.status.capabilities, intruder.status.no_new_privileges) == (0, True)


@pytest.fixture
def listeners(place: Path) -> Iterator[tuple[int, str, Path]]:
    """Sockets that everybody may connect or send to: a port of TCP and of UDP, an abstract name, a path, and a path
    for datagrams beside it."""
    tcp = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0{place.name}")
    path = place / "volant.sock"
    unix = socket.socket(socket.AF_UNIX)
    unix.bind(str(path))
    path.chmod(0o666)
    for each in (abstract, unix):
        each.listen()
    udp = socket.socket(type=socket.SOCK_DGRAM)
    udp.bind(tcp.getsockname())
    datagrams = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    datagrams.bind(str(path.with_name(DATAGRAMS)))
    path.with_name(DATAGRAMS).chmod(0o666)
    yield tcp.getsockname()[1], place.name, path
    for each in (tcp, abstract, unix, udp, datagrams):
        each.close()


DATAGRAMS = "datagrams.sock"


def datagrams(port: int, path: Path) -> list[tuple[object, ...]]:
    """Ways to send something without a connection."""
    there = str(path.with_name(DATAGRAMS))
    return [
        ("udp", port), ("datagram", there), ("raw datagram", there), ("datagram pair",), ("netlink",),
    ]  # fmt: skip


@pytest.mark.parametrize("network", ["none", "user"])
async def test_an_intruder_connects_to_nothing_and_signals_no_process(
    plan: SandboxPlan, other: MachineSpec, qemu: QemuHypervisor, intruder: Intruder, listeners: tuple[int, str, Path],
    network: str,
) -> None:  # fmt: skip
    port, name, path = listeners
    if network == "user":
        # The socket of its own passt, to which it already has a connection.
        nic = Nic(mac="02:00:00:00:00:07", socket=path)
        intruder.spec = msgspec.structs.replace(intruder.spec, nic=nic)
    with trio.fail_after(60):
        victim = await qemu.launch(other)
        tasks: list[tuple[object, ...]] = [
            ("tcp", port), ("abstract", name), ("unix", str(path)), ("uring",),
            ("fast", port), ("fast message",), *datagrams(port, path),
            ("kill", victim.pid), ("kill", os.getpid()), ("ptrace", victim.pid), ("ptrace", os.getpid()),
            ("read", f"/proc/{victim.pid}/mem"), ("read", f"/proc/{os.getpid()}/environ"),
            ("setuid",), ("chroot",), ("mount",), ("list", "/proc/1/root"),
        ]  # fmt: skip
        if plan.landlock >= 4:
            tasks.append(("listen",))
        found = await intruder.tries(tasks)
    assert {task: result for task, result in found.items() if result not in DENIED} == {}
    assert intruder.status is not None
    assert intruder.status.capabilities == 0
    if plan.users is not None:
        assert intruder.status.user == user_of(plan.users, intruder.spec.tag, 7)


async def test_landlock_alone_denies_ports_and_processes(
    plan: SandboxPlan, other: MachineSpec, qemu: QemuHypervisor, intruder: Intruder, listeners: tuple[int, str, Path]
) -> None:
    port, name, _ = listeners
    intruder.plan = msgspec.structs.replace(plan, users=None, no_connect=False)
    if plan.landlock < 6:
        pytest.skip("this Landlock knows of no sockets and signals")
    with trio.fail_after(60):
        victim = await qemu.launch(other)
        found = await intruder.tries(
            [
                ("tcp", port), ("abstract", name), ("listen",), ("kill", victim.pid), ("ptrace", victim.pid),
                # Landlock lets it pass, the filter does not.
                ("fast", port), ("fast message",),
            ]
        )  # fmt: skip
    assert {task: result for task, result in found.items() if result not in DENIED} == {}


async def test_without_a_sandbox_the_intruder_can_do_everything(
    host: Host, plan: SandboxPlan, spec: MachineSpec, intruder: Intruder, listeners: tuple[int, str, Path], place: Path
) -> None:
    """Otherwise the other tests would prove nothing."""
    port, name, path = listeners
    tasks: list[tuple[object, ...]] = [
        ("tcp", port), ("abstract", name), ("unix", str(path)), ("listen",), ("read", "/etc/passwd"),
        ("list", str(place)), ("make", "new"), ("fast", port), ("fast message",), *datagrams(port, path),
        ("reserve", "new"), ("zero", "new"), ("punch", "new"), ("link", "console.sock"), ("rename", "console.log"),
    ]  # fmt: skip
    found, _ = await tries(host, spec.tag, spec.directory, None, tasks)
    assert set(found.values()) == {"DONE"}


async def test_nothing_starts_where_the_sandbox_cannot_be_set_up(
    host: Host, plan: SandboxPlan, spec: MachineSpec, intruder: Intruder
) -> None:
    await intruder.tries([("bind", "a.sock")])
    sandbox = await QemuSandbox(host, plan).prepare(spec)
    gone = msgspec.structs.replace(sandbox, landlock=True, read=(spec.directory / "gone",))
    with pytest.raises(OSError, match="gone"):
        await host.processes.spawn(
            ["/bin/true", spec.tag], tag=spec.tag, env={}, cwd=spec.directory,
            stdout_path=spec.directory / "out", sandbox=gone,
        )  # fmt: skip
    assert await host.processes.find(spec.tag) is None


async def test_setting_up_a_sandbox_does_not_restrict_the_daemon(
    host: Host, plan: SandboxPlan, intruder: Intruder
) -> None:
    before = (os.getresuid(), os.getgroups(), Path.cwd(), _status_of_threads())
    await intruder.tries([("bind", "a.sock")])
    assert (os.getresuid(), os.getgroups(), Path.cwd(), _status_of_threads()) == before
    assert "sandbox" not in {thread.name for thread in threading.enumerate()}


def _status_of_threads() -> set[tuple[str, ...]]:
    kinds = ("Uid:", "Gid:", "Groups:", "CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:")
    return {
        tuple(line for line in (path / "status").read_text().splitlines() if line.startswith(kinds))
        for path in Path("/proc/self/task").iterdir()
    }


@as_root
async def test_a_hypervisor_has_the_group_of_kvm_or_no_separate_user(
    host: Host, plan: SandboxPlan, spec: MachineSpec, qemu: QemuHypervisor, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await prepare_files(host, spec)
    device = place / "kvm"
    device.touch()
    monkeypatch.setattr(qemu_sandbox, "_KVM", device)
    kvm = msgspec.structs.replace(spec, accelerator="kvm")
    os.chown(device, 0, 991)
    for mode, user, groups in ((0o666, True, ()), (0o660, True, (991,)), (0o600, False, ()), (0o640, False, ())):
        device.chmod(mode)
        sandbox = await QemuSandbox(host, plan).prepare(kvm)
        assert (sandbox.user is not None, sandbox.groups) == (user, groups), oct(mode)
        assert device in sandbox.write
        said = msgspec.json.decode(spec.sandbox_path.read_bytes())["no_user"]
        assert (said is None) == user, said
    os.chown(device, 0, 0)
    device.chmod(0o660)
    # Being in root's group would be worse than having root's user id.
    assert (await QemuSandbox(host, plan).prepare(kvm)).user is None


def test_the_host_says_why_it_has_no_separate_users(host: Host, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = place / "closed"
    closed.mkdir(mode=0o700)
    (closed / "state").mkdir()

    def why(directory: Path) -> str:
        support = host.sandbox.support([directory])
        assert support is not None
        return str(support.no_users)

    if os.geteuid() != 0:
        assert why(place) == "volantd does not run as root"
        return
    assert why(place) == "None"
    assert why(closed / "state").startswith(f"{closed} lets no other user through")
    assert [path.name for path in place.iterdir()] == ["closed"]

    def refuses(code: int) -> None:
        def setxattr(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "setxattr", setxattr)

    refuses(errno.EOPNOTSUPP)
    assert "no access lists" in why(place)
    # A full disk does not mean that there are no ACLs.
    refuses(errno.ENOSPC)
    assert why(place) == "None"
    monkeypatch.setattr(_procfs, "own_capabilities", lambda: 1 << 7)
    assert why(place) == "volantd lacks CAP_KILL, CAP_SETGID, CAP_SETPCAP, CAP_SYS_PTRACE"
