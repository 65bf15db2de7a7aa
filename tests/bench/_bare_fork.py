"""A fork by a script, as the baseline for the daemon's.

It uses only the mechanism: copy the template's file, pause the guest, let QEMU save its devices, read the guest's own
pages, copy its disk layer, resume it, and load all that into another QEMU. It leaves out what makes a fork safe: open
agent connections, a new identity for the copy, clean-up if the script is killed, and resuming a guest whose copy fails.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from volant.host import PROGRAM_ENVIRONMENT
from volant.hypervisor import MachineSpec
from volant.hypervisor.qemu._migration import complete

from ._world import start_program

_PAGE = 4096
_CHUNK = 1024 * 1024
_CONNECT_S = 10.0
_OWN = bytes(bool(byte & 0xC0 and not byte & 0x20) for byte in range(256))
_RUN = re.compile(rb"\x01+")


def fork(
    origin: MachineSpec, pid: int, copy: MachineSpec, argv: Sequence[str]
) -> tuple[subprocess.Popen[bytes], float]:
    """Forks a running clone; returns the running process of the copy, and for how long the guest was paused.

    `pid` is the process of `origin`, which must have no QMP client. `copy.template` names two files that do not exist
    yet; `argv` is the command line of `copy`, whose directory exists and contains its named pipe.
    """
    assert origin.template is not None
    assert copy.template is not None
    size = origin.memory_mb * 1024 * 1024
    source = os.open(origin.template.memory, os.O_RDONLY)
    target = os.open(copy.template.memory, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
    pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
    try:
        _copy_file(source, target, size)
        start = _mapping(pid, size)
        qmp = _Qmp(origin.control_path)
        machine = str(qmp.ask("qom-get", path="/machine", property="type")).removesuffix("-machine")
        began = time.perf_counter()
        qmp.ask("stop")
        qmp.ask("xen-save-devices-state", filename=str(copy.template.state), live=False)
        _copy_own_pages(memory, pagemap, start, target, size)
        if copy.root is not None and origin.root is not None:
            shutil.copyfile(origin.root.layer, copy.root.layer)
        qmp.ask("cont")
        paused_s = time.perf_counter() - began
        qmp.close()
        copy.template.state.write_bytes(complete(copy.template.state.read_bytes(), machine))
    finally:
        for fd in (source, target, memory, pagemap):
            os.close(fd)
    process = start_program(argv, copy.directory, copy.log_path, PROGRAM_ENVIRONMENT)
    qmp = _Qmp(copy.control_path)
    qmp.ask(
        "migrate-set-capabilities",
        capabilities=[{"capability": name, "state": True} for name in ("x-ignore-shared", "events")],
    )
    qmp.ask("migrate-incoming", uri=f"file:{copy.template.state}")
    if (status := qmp.migrated()) != "completed":
        raise RuntimeError(f"the copy does not go on: {status}")
    qmp.ask("cont")
    qmp.close()
    return process, paused_s


def _copy_file(source: int, target: int, size: int) -> None:
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:
            return
        end = os.lseek(source, at, os.SEEK_HOLE)
        os.lseek(target, at, os.SEEK_SET)
        while at < end:
            at += os.sendfile(target, source, at, end - at)


def _mapping(pid: int, size: int) -> int:
    """Returns the address of the guest's memory in the process."""
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        span, access, *rest = line.split()
        start, end = (int(address, 16) for address in span.split("-"))
        if end - start == size and access == "rw-p" and len(rest) > 3:
            return start
    raise RuntimeError(f"process {pid} has no memory of {size} bytes")


def _copy_own_pages(memory: int, pagemap: int, start: int, target: int, size: int) -> None:
    entries = os.pread(pagemap, size // _PAGE * 8, start // _PAGE * 8)
    buffer = memoryview(bytearray(_CHUNK))
    for run in _RUN.finditer(entries[7::8].translate(_OWN)):
        at, end = run.start() * _PAGE, run.end() * _PAGE
        while at < end:
            count = os.preadv(memory, [buffer[: end - at]], start + at)
            os.pwrite(target, buffer[:count], at)
            at += count


class _Qmp:
    def __init__(self, path: Path) -> None:
        deadline = time.monotonic() + _CONNECT_S
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.settimeout(_CONNECT_S)
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self._socket.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        self._lines = self._socket.makefile("rb")
        self._status = ""
        self._next()
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        message = {"execute": command, **({"arguments": arguments} if arguments else {})}
        self._socket.sendall(json.dumps(message).encode())
        while "return" not in (answer := self._next()):
            if "error" in answer:
                raise RuntimeError(f"{command}: {answer['error']}")
        return answer["return"]

    def migrated(self) -> str:
        """Waits for its end; returns its status."""
        while self._status not in ("completed", "failed"):
            self._next()
        return self._status

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def _next(self) -> dict[str, Any]:
        line = self._lines.readline()
        if not line:
            raise RuntimeError("QEMU has closed its control socket")
        message: dict[str, Any] = json.loads(line)
        if message.get("event") == "MIGRATION":
            self._status = message["data"]["status"]
        return message
