"""A program that tries what an attacker with control of a hypervisor's process would try."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import trio

from volant.host import Host, ProcessStatus, Sandbox

PYTHON = next((path for path in map(Path, ("/usr/bin/python3.13", "/usr/bin/python3")) if path.exists()), None)
"""The system's Python, as the sandbox allows no program outside the system's directories."""

INTRUDER = r"""
import ctypes, errno, json, os, signal, socket, sys
tasks = json.loads(sys.argv[2])
def trial(what, *arguments):
    try:
        if what == "read": open(arguments[0], "rb").read(1)
        elif what == "write": open(arguments[0], "r+b").close()
        elif what == "append": open(arguments[0], "ab").close()
        elif what == "list": os.listdir(arguments[0])
        elif what == "make": open(arguments[0], "xb").close()
        elif what == "link": os.symlink("/etc/passwd", arguments[0])
        elif what == "remove": os.unlink(arguments[0])
        elif what == "rename": os.rename(arguments[0], arguments[0] + "x")
        elif what == "chmod": os.chmod(arguments[0], 0o777)
        elif what == "mode": os.chmod(arguments[0], arguments[1])
        elif what == "create": os.close(os.open(arguments[0], os.O_CREAT | os.O_EXCL | os.O_WRONLY, arguments[1]))
        elif what == "mkdir": os.mkdir(arguments[0])
        elif what == "rmdir": os.rmdir(arguments[0])
        elif what == "device": os.mknod(arguments[0], 0o20666, os.makedev(1, 5))
        elif what == "chown": os.chown(arguments[0], -1, os.getgid())
        elif what == "move": os.rename(arguments[0], arguments[1])
        elif what == "bind": socket.socket(socket.AF_UNIX).bind(arguments[0])
        elif what == "unix": socket.socket(socket.AF_UNIX).connect(arguments[0])
        elif what == "abstract": socket.socket(socket.AF_UNIX).connect("\0" + arguments[0])
        elif what == "tcp": socket.create_connection(("127.0.0.1", arguments[0]), 2)
        elif what == "fast": socket.socket().sendto(b"GET / HTTP/1.0\r\n\r\n", 0x20000000, ("127.0.0.1", arguments[0]))
        elif what == "fast message":
            one, other = socket.socketpair()
            one.sendmsg([b"x"], [], 0x20000000)
        elif what == "udp": socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", arguments[0]))
        elif what == "datagram": socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"x", arguments[0])
        elif what == "raw datagram": socket.socket(socket.AF_UNIX, socket.SOCK_RAW).sendto(b"x", arguments[0])
        elif what == "datagram pair": socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        elif what == "netlink": socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)
        elif what == "stream pair": socket.socketpair()
        elif what in ("reserve", "punch", "zero"):
            libc = ctypes.CDLL(None, use_errno=True)
            mode = {"reserve": 1, "punch": 3, "zero": 0x11}[what]
            with open(arguments[0], "r+b") as file:
                if libc.fallocate(file.fileno(), mode, ctypes.c_long(1 << 20), ctypes.c_long(1 << 20)):
                    raise OSError(ctypes.get_errno(), what)
        elif what == "listen": socket.socket().bind(("127.0.0.1", 0))
        elif what == "kill": os.kill(arguments[0], signal.SIGTERM)
        elif what == "ptrace":
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.ptrace(16, arguments[0], 0, 0): raise OSError(ctypes.get_errno(), "ptrace")
        elif what == "setuid": os.setresuid(0, 0, 0)
        elif what == "chroot": os.chroot("/")
        elif what == "mount":
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.mount(b"none", b"/tmp", b"tmpfs", 0, 0): raise OSError(ctypes.get_errno(), "mount")
        elif what == "uring":
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.syscall(425, 8, ctypes.create_string_buffer(200)) < 0: raise OSError(ctypes.get_errno(), "io_uring")
        else: return "no such trial"
    except OSError as error:
        return errno.errorcode[error.errno]
    return "DONE"
print(json.dumps([trial(*task) for task in tasks]), flush=True)
print("end", flush=True)
signal.pause()
"""
"""Runs the tasks in its arguments, and prints the result of each."""

DENIED = frozenset({"EACCES", "EPERM"})
NOT_RESERVED = "ENOTSUP"
"""What the sandbox says to a request for space, as file systems do that can't."""


async def tries(
    host: Host, tag: str, directory: Path, sandbox: Sandbox | None, tasks: Sequence[Sequence[object]]
) -> tuple[dict[tuple[object, ...], str], ProcessStatus]:
    """Returns the result of each task, tried in this sandbox in QEMU's place, and the process status that it had."""
    output = directory / "qemu.log"
    await host.files.remove(output)
    argv = [str(PYTHON), "-I", "-S", "-c", INTRUDER, f"guest={tag}", json.dumps(tasks)]
    env = {"PATH": "/usr/bin"}
    identity = await host.processes.spawn(argv, tag=tag, env=env, cwd=directory, stdout_path=output, sandbox=sandbox)
    with trio.fail_after(30), host.processes.open(identity) as process:
        with host.watches.open(output) as watch:
            while b"end\n" not in (said := await host.files.read(output)) and not process.exited:
                await watch.wait()
        status = host.proc.status(identity)
        process.kill()
        await process.wait()
    results: list[str] = json.loads(said.splitlines()[0])
    return {tuple(task): result for task, result in zip(tasks, results, strict=True)}, status
