"""PID 1: sets up the guest, restarts the agent, and shuts down the guest.

It is in Python and not BusyBox's init: the agent needs the interpreter anyway, and PID 1 starts it once and forks the
agent from it. BusyBox's init would also run a shell and an inittab first; it waits fixed seconds at a shutdown,
respawns without end, and does not detect a shutdown that hangs. The price is that an exception here is a kernel panic.
So this module is short, imports little, and does the rest through BusyBox. As the daemon detects a panic best, PID 1
also gives up with one.

The order decides the duration of a boot, as there may be one slow CPU: first the setup that makes the agent reachable,
then the fork, and the rest once the agent has answered its first request.
"""

# ruff: noqa: PTH102, PTH103, PTH123, PTH208, PTH211, S606 - pathlib would cost every boot more than this module does

from __future__ import annotations

import os
import signal
import sys
import time

from ._system import GRACE_FILE, WORKLOAD_FILE, kernel_parameter, kernel_parameters, read_text, say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

BUSYBOX = "/usr/bin/busybox"
_RESPAWNS = 5
_RESPAWN_WINDOW_S = 60.0
_MAX_GRACE_S = 600.0
_READY_MS = 10_000
_HOSTNAME = "volant"
_AFTER_KILL_S = 3.0
_LAST_WORDS_S = 5.0
_ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "NO_COLOR": "1",
}
_FIRST_MOUNTS = """\
proc /proc proc nosuid,nodev,noexec 0 0
sysfs /sys sysfs nosuid,nodev,noexec 0 0
devtmpfs /dev devtmpfs nosuid,mode=0755 0 0
tmpfs /run tmpfs nosuid,nodev,mode=0755 0 0
tmpfs /tmp tmpfs nosuid,nodev,mode=1777 0 0
"""
_LATER_MOUNTS = """\
devpts /dev/pts devpts nosuid,noexec,gid=5,mode=0620,ptmxmode=0666 0 0
tmpfs /dev/shm tmpfs nosuid,nodev,mode=1777 0 0
cgroup2 /sys/fs/cgroup cgroup2 nosuid,nodev,noexec,nsdelegate 0 0
"""
_DEBUGFS = "/sys/kernel/debug"
_DEBUGFS_MOUNT = f"debugfs {_DEBUGFS} debugfs nosuid,nodev,noexec,mode=0700 0 0\n"
_VIRTIO_MODULES = {2: "virtio_blk", 4: "virtio_rng", 19: "vmw_vsock_virtio_transport"}
_VIRTIO_NET = 1
_VIRTIO_BALLOON = 5
_VIRTIO_VSOCK = 19
_QUIET = {
    "kernel/soft_watchdog": "0",  # each 4 s; a busy host makes it report hangs that are none
    "vm/compaction_proactiveness": "0",  # twice a second; memory is still compacted when an allocation needs it
    "vm/stat_interval": "60",  # each second
}
"""Kernel settings below /proc/sys that stop timers which would wake an idle guest."""
_FAIR_SERVERS = f"{_DEBUGFS}/sched/fair_server"
"""The time that the scheduler reserves next to real-time programs, for each processor. Each wake-up of an idle guest
starts a timer for it, which wakes the guest again a second later."""
_PVPANIC = ("0x1b36", "0x0011")
_PVPANIC_ISA = "QEMU0001"
"""The ACPI id of pvpanic on machines without PCI, not only on ISA."""


def main() -> NoReturn:
    """Sets up the guest, keeps the agent running, and powers off or reboots on a signal."""
    if os.getpid() != 1:
        raise SystemExit("this is PID 1's program")
    os.environ.clear()
    os.environ.update(_ENVIRONMENT)
    os.umask(0o022)
    signals = {signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR2, signal.SIGPWR}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    _mount(_FIRST_MOUNTS)
    os.mkdir("/run/volant", 0o700)
    _set_hostname(kernel_parameter("volant.hostname") or _HOSTNAME)
    _loopback_up()
    _load_channel_modules()
    ready, ready_agent = os.pipe()
    set_up, set_up_agent = os.pipe()
    agent = _start_agent(signals, (ready_agent, set_up), (ready, set_up_agent))
    os.close(ready_agent)
    os.close(set_up)
    _wait_for(ready)
    _finish_setup()
    os.close(set_up_agent)
    from ._console import Console
    from ._rootfs import ROOT, STATE_FILE

    console = Console(BUSYBOX, ROOT, STATE_FILE, say)
    console.start()
    starts = [time.monotonic()]
    while True:
        got = signal.sigwait(signals)
        if got != signal.SIGCHLD:
            # BusyBox's `reboot` sends SIGTERM, `poweroff` SIGUSR2.
            console.hang_up()
            _shut_down(agent, "reboot" if got == signal.SIGTERM else "poweroff")
        for pid in _reap():
            if pid == agent:
                agent = _respawn(signals, starts)
            elif pid == console.pid:
                console.start()


def _run(arguments: list[str]) -> int:
    """Runs BusyBox and waits for it; returns its exit code."""
    pid = os.posix_spawn(BUSYBOX, ["busybox", *arguments], os.environ, setsigmask=())
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _mount(table: str) -> None:
    with open("/etc/fstab", "w") as handle:
        handle.write(table)
    if _run(["mount", "-a"]) != 0:
        say("a file system can't be mounted")


def _set_hostname(name: str) -> None:
    if not name or len(name) > 63 or not name.replace("-", "").isalnum() or not name.isascii():
        return
    try:
        with open("/proc/sys/kernel/hostname", "w") as handle:
            handle.write(name)
    except OSError as error:
        say(f"the host name can't be set: {error}")


def _loopback_up() -> None:
    # Opening the socket through _socket alone: the module around it costs ten times as much to import.
    import _socket
    import fcntl
    import struct

    try:
        control = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
        try:
            request = struct.pack("16sH14x", b"lo", 0x1 | 0x40)  # IFF_UP | IFF_RUNNING
            fcntl.ioctl(control.fileno(), 0x8914, request)  # SIOCSIFFLAGS
        finally:
            control.close()
    except OSError as error:
        say(f"lo can't be brought up: {error}")


def _list(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _virtio_ids() -> set[int]:
    base = "/sys/bus/virtio/devices"
    texts = [read_text(f"{base}/{name}/device") for name in _list(base)]
    return {int(text, 16) for text in texts if text}


def _load_channel_modules() -> None:
    """Loads the modules of the device that carries the agent's channel."""
    devices = [word for word in kernel_parameters() if word.startswith("virtio_mmio.device=")]
    if devices or any(name.startswith("LNRO0005") for name in _list("/sys/bus/acpi/devices")):
        _load(["virtio_mmio"], {"virtio_mmio": [word.split(".", 1)[1] for word in devices]})
    if _VIRTIO_VSOCK in _virtio_ids():
        _load([_VIRTIO_MODULES[_VIRTIO_VSOCK]])


def _wait_for(ready: int) -> None:
    """Waits until the agent has closed its end of a pipe: it is idle, or has died."""
    import select

    poll = select.poll()
    poll.register(ready, select.POLLIN)
    poll.poll(_READY_MS)
    os.close(ready)


def _finish_setup() -> None:
    """Finishes the setup. A failure is reported on the console, and the boot continues."""
    present = _virtio_ids() - {_VIRTIO_VSOCK}
    try:
        modules = []
        base = "/sys/bus/pci/devices"
        for name in _list(base):
            if (read_text(f"{base}/{name}/vendor"), read_text(f"{base}/{name}/device")) == _PVPANIC:
                modules = ["pvpanic", "pvpanic_pci"]
        if any(name.startswith(_PVPANIC_ISA) for name in _list("/sys/bus/acpi/devices")):
            modules += ["pvpanic", "pvpanic_mmio"]
        _load(modules + [_VIRTIO_MODULES[number] for number in sorted(present) if number in _VIRTIO_MODULES])
        for path in ("/dev/pts", "/dev/shm"):
            os.makedirs(path, exist_ok=True)
        _mount(_LATER_MOUNTS + (_DEBUGFS_MOUNT if os.path.lexists(_DEBUGFS) else ""))
        for link, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
            if not os.path.lexists(f"/dev/{link}"):
                os.symlink(f"/proc/self/{target}", f"/dev/{link}")
    except OSError as error:
        say(f"the guest is not set up completely: {error}")
    _quiet_timers()
    serial = kernel_parameter("volant.root")
    if serial:
        from ._rootfs import mount_root

        image = kernel_parameter("volant.image")
        if image:
            _load(["erofs", "overlay"])
        mount_root(serial, image, _run, say)
    if _VIRTIO_NET in present:
        from . import _network

        _network.boot(
            kernel_parameter("volant.net"), kernel_parameter("volant.dns"), lambda: _load(["virtio_net"]), say
        )
    if _VIRTIO_BALLOON in _virtio_ids():
        # Returns freed memory to the host. Nobody waits for that, so it comes last.
        _load(["virtio_balloon"])


def _quiet_timers() -> None:
    """Sets `_QUIET`, except for settings on the kernel's command line, and reserves no time next to real-time
    programs."""
    chosen = {word.partition("=")[0].replace(".", "/") for word in kernel_parameters()}
    wanted = {f"/proc/sys/{name}": value for name, value in _QUIET.items() if f"sysctl/{name}" not in chosen}
    wanted |= {f"{_FAIR_SERVERS}/{cpu}/runtime": "0" for cpu in _list(_FAIR_SERVERS)}
    for path, value in wanted.items():
        try:
            with open(path, "w") as handle:
                handle.write(value)
        except OSError:
            pass  # another kernel


def _load(modules: list[str], parameters: dict[str, list[str]] | None = None) -> None:
    """Loads kernel modules, each after its dependencies."""
    if not modules:
        return
    needs: dict[str, list[str]] = {}
    for line in _read_all("/usr/lib/modules/dependencies"):
        name, *others = line.split()
        needs[name] = others
    loaded = {line.split()[0] for line in _read_all("/proc/modules")}
    order: list[str] = []

    def visit(name: str) -> None:
        if name not in order and name not in loaded:
            for need in needs.get(name, ()):
                visit(need)
            order.append(name)

    for module in modules:
        visit(module)
    for name in order:
        if _run(["insmod", f"/usr/lib/modules/{name}.ko", *(parameters or {}).get(name, ())]) != 0:
            say(f"the kernel module {name} can't be loaded")


def _read_all(path: str) -> list[str]:
    with open(path) as handle:
        return handle.read().splitlines()


def _start_agent(signals: set[signal.Signals], its: tuple[int, ...] = (), ours: tuple[int, ...] = ()) -> int:
    """Forks the agent; returns its pid.

    :param its: the agent's ends of the pipes between the two
    :param ours: the ends of PID 1, which the agent closes
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        for end in ours:
            os.close(end)
        from . import _main

        _main.main(*its)
    except BaseException:
        # The child must never return into PID 1's loop.
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def _respawn(signals: set[signal.Signals], starts: list[float]) -> int:
    now = time.monotonic()
    starts[:] = [start for start in starts if now - start < _RESPAWN_WINDOW_S]
    if len(starts) >= _RESPAWNS:
        say(f"the agent ended {len(starts)} times within {_RESPAWN_WINDOW_S:.0f} s: giving up")
        os._exit(1)
    starts.append(now)
    say("the agent ended: starting it again, without its workload")
    # Its workload has lost its pipes and its supervisor.
    _signal_all(signal.SIGKILL)
    return _start_agent(signals)


def _reap() -> list[int]:
    pids: list[int] = []
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return pids
        if pid == 0:
            return pids
        pids.append(pid)


def _signal_all(number: signal.Signals) -> None:
    try:
        os.kill(-1, number)
    except ProcessLookupError:
        pass


def _ask_to_end() -> None:
    """Sends SIGTERM to all processes except those of the workload, which receives its stop signal from the agent."""
    workload = read_text(WORKLOAD_FILE)
    if not workload:
        _signal_all(signal.SIGTERM)
        return
    for name in _list("/proc"):
        if not name.isdigit() or name == "1":
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as handle:
                session = handle.read(4096).rpartition(b")")[2].split()[3].decode()
            # The kernel's own threads have the session 0.
            if session not in ("0", workload):
                os.kill(int(name), signal.SIGTERM)
        except (OSError, IndexError):
            pass  # it has ended


def _shut_down(agent: int, how: str) -> NoReturn:
    """Asks all processes to end, waits for the grace period, sends SIGKILL, and runs BusyBox's `how`.

    The agent gets a little longer than the rest.
    """
    grace = 10.0
    try:
        grace = min(max(float(read_text(GRACE_FILE)), 0.0), _MAX_GRACE_S)
    except ValueError:
        pass
    say("shutting down")
    _ask_to_end()
    _signal_all(signal.SIGCONT)
    if not _wait_for_all(grace):
        say("some processes did not end when they were asked to")
        # The agent still delivers the last output, and ends after that.
        for name in _list("/proc"):
            if name.isdigit() and int(name) not in (1, agent):
                try:
                    os.kill(int(name), signal.SIGKILL)
                except ProcessLookupError:
                    pass
        if not _wait_for_all(_LAST_WORDS_S):
            _signal_all(signal.SIGKILL)
            _wait_for_all(_AFTER_KILL_S)
    os.sync()
    from ._rootfs import DISK, ROOT

    _unmount_volumes(ROOT)
    for place in (ROOT, DISK):
        if os.path.ismount(place) and _run(["mount", "-o", "remount,ro", place]) != 0:
            # For instance by a mount inside it. Synced data is safe, and ext4's journal does the rest.
            say("the root filesystem is still in use")
    os.execv(BUSYBOX, ["busybox", how, "-f"])


def _unmount_volumes(root: str) -> None:
    """Unmounts directories of the host, and the filesystems on disks except the root, so that their journals need no
    replay."""
    with open("/proc/mounts", errors="surrogateescape") as handle:
        lines = handle.read().splitlines()
    for line in reversed(lines):
        source, target, kind, *_ = line.split(" ")
        # Blanks, tabs, line feeds and backslashes in a path are three octal digits after a backslash.
        first, *others = target.split("\\")
        path = first + "".join(chr(int(other[:3], 8)) + other[3:] for other in others)
        is_volume = source.startswith("/dev/vd") or kind == "virtiofs"
        if not is_volume or (os.path.ismount(root) and not path.startswith(f"{root}/")):
            continue
        if _run(["umount", path]) != 0 and _run(["mount", "-o", "remount,ro", path]) != 0:
            say(f"{path} is still in use")


def _wait_for_all(timeout_s: float) -> bool:
    """Waits for all processes except PID 1; returns whether they ended within `timeout_s`."""
    end = time.monotonic() + timeout_s
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        left = end - time.monotonic()
        if left <= 0:
            return False
        signal.sigtimedwait({signal.SIGCHLD}, left)
