"""A host of its own: systemd as PID 1 of its own namespaces, with the machine's programs and nobody else's units.

What it writes lies in a folder of the test's or in its own memory. When its first process ends, everything that runs in
it ends with it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from volant.client import Client

SYSTEMD = Path("/lib/systemd/systemd")
UNSHARE = ("unshare", "--mount", "--pid", "--fork", "--mount-proc", "--uts", "--ipc", "--cgroup", "--net")
_UNITS = Path("/usr/lib/systemd/system")
_TAKEN = (
    *("sysinit.target", "basic.target", "sockets.target", "slices.target", "paths.target", "timers.target"),
    *("local-fs.target", "local-fs-pre.target", "swap.target", "multi-user.target"),
    *("shutdown.target", "umount.target", "final.target", "poweroff.target", "systemd-poweroff.service"),
    *("systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket"),
)
"""What a small system has of Debian's units."""

_BEGIN = r"""
set -eu
mount --make-rprivate /
mount -t cgroup2 none /sys/fs/cgroup
for each in /run /srv; do mount -t tmpfs -o mode=755 tmpfs "$each"; done
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
cp -a /etc "$ROOT/etc"
mount --bind "$ROOT/etc" /etc
mount -t tmpfs -o mode=755 tmpfs /etc/systemd/system
for place in system-generators system-environment-generators system-shutdown; do
    [ ! -d /usr/lib/systemd/$place ] || mount --bind "$ROOT/empty" /usr/lib/systemd/$place
done
mount --bind "$ROOT/units" /usr/lib/systemd/system
mount --bind "$ROOT/var" /var
mkdir -p /run/lock /var/tmp
# As on a host: what systemd mounts for a service in a namespace (its credentials) comes about here.
mount --make-rshared /
exec env -i container=oci PATH="$PATH" /lib/systemd/systemd --system --unit=multi-user.target --log-target=journal
"""


class Box:
    """The host. `start` it, `run` programs in it, `dispose` of it."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self.root = Path(tempfile.mkdtemp(prefix="vt", dir="/tmp"))
        self._private = set(_private())
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0

    def start(self) -> None:
        """Boot it."""
        (self.root / "empty").mkdir()
        for place in ("lib", "log/journal", "cache"):
            (self.root / "var" / place).mkdir(parents=True)
        self._fill_cache()
        (self.root / "units").mkdir()
        for name in _TAKEN:
            shutil.copy(_UNITS / name, self.root / "units" / name)
        wants = self.root / "units" / "sysinit.target.wants"
        wants.mkdir()
        (wants / "systemd-journald.service").symlink_to("../systemd-journald.service")
        with (self.root / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [*UNSHARE, "--kill-child=KILL", "bash", "-c", _BEGIN],
                env={**os.environ, "ROOT": str(self.root)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.until(lambda: self.systemctl("is-system-running").stdout.strip() in ("running", "degraded"), 60)
        self.run("journalctl", "--flush")

    def _fill_cache(self) -> None:
        """Its cache has the boot image, as a copy: what happens to it in there happens to nobody else's."""
        cache = self.root / "var" / "cache" / "volant"
        cache.mkdir(mode=0o700)
        shutil.copytree(self._cache / "images", cache / "images")
        for path in self._cache.glob("*.json"):
            shutil.copy(path, cache / path.name)

    @property
    def init(self) -> int:
        """Its first process, as this machine counts."""
        assert self._process is not None
        if not self._init:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
            self._init = int(children[0]) if children else 0
        return self._init

    @property
    def runs(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def run(self, *command: str, timeout_s: float = 60.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program in it."""
        done = subprocess.run(
            ["nsenter", f"--target={self.init}", "--mount", "--pid", "--uts", "--ipc", "--net", "--cgroup", *command],
            env={"PATH": os.environ["PATH"], "HOME": "/", "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    def systemctl(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        if not self.runs or not self.init:
            return subprocess.CompletedProcess(arguments, 1, "", "it does not run")
        return self.run("systemctl", "--no-pager", *arguments, timeout_s=timeout_s, check=False)

    def volar(self, *arguments: str, timeout_s: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run(str(Path(sys.executable).parent / "volar"), *arguments, timeout_s=timeout_s, check=check)

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", "--property", name, unit).stdout.strip()

    def scopes(self) -> list[str]:
        """The VMs' scopes that there are."""
        listed = self.systemctl("list-units", "--plain", "--no-legend", "--type=scope", "volant-*").stdout
        return sorted(line.split()[0] for line in listed.splitlines())

    def processes(self, word: str) -> dict[int, str]:
        """Processes in it whose command line holds `word`: their ids, as it counts, and the units that they are in."""
        found = {}
        for line in self.run("ps", "-eo", "pid=,args=", check=False).stdout.splitlines():
            pid, _, arguments = line.strip().partition(" ")
            if word in arguments and "ps -eo" not in arguments:
                groups = self.run("cat", f"/proc/{pid}/cgroup", check=False).stdout.splitlines()
                found[int(pid)] = next((group[3:] for group in groups if group.startswith("0::")), "")
        return found

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """Entries of its journal, also after its end."""
        folder = str(self.root / "var" / "log" / "journal")
        done = subprocess.run(
            ["journalctl", "-D", folder, "-o", "json", "--all", "--no-pager", "-q", *matches],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    def said(self, *matches: str) -> list[str]:
        # It reads the kernel's messages of this machine, too.
        entries = (entry for entry in self.journal(*matches) if entry.get("_TRANSPORT") != "kernel")
        return [str(entry.get("MESSAGE")) for entry in entries]

    def client(self) -> Client:
        return Client(f"unix:/proc/{self.init}/root/run/volant/volant.sock")

    def until(self, holds: Any, timeout_s: float) -> None:
        """Ask again and again, as systemd offers no wait for it."""
        give_up_at = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < give_up_at, self.tail()
            time.sleep(0.1)

    def tail(self) -> str:
        """The last that it has said."""
        return "\n".join([(self.root / "log").read_text(errors="replace")[-3000:], *self.said()[-60:]])

    def wait(self, timeout_s: float) -> None:
        """Until it has powered off."""
        assert self._process is not None
        self._process.wait(timeout_s)

    def dispose(self) -> None:
        """End it, whatever state it is in, and remove what it has written."""
        if self.runs:
            assert self._process is not None
            if self.init:
                os.kill(self.init, signal.SIGKILL)
            self._process.kill()
            self._process.wait(30)
        # The private directories of services that were killed with it.
        for path in (self.root, *(set(_private()) - self._private)):
            shutil.rmtree(path, ignore_errors=True)


def _private() -> Iterator[Path]:
    return Path("/tmp").glob("systemd-private-*-volant*")


def missing() -> str | None:
    """Why there can be no such host here."""
    for program in ("unshare", "nsenter", "systemctl", "journalctl", "systemd-analyze", "ps"):
        if shutil.which(program) is None:
            return f"there is no {program}"
    if not SYSTEMD.exists():
        return "there is no systemd"
    if os.geteuid() != 0:
        return "namespaces with a systemd in them are for root"
    mounts = "mount --make-rprivate / && mount -t cgroup2 none /sys/fs/cgroup && mount -t tmpfs tmpfs /run"
    tried: Sequence[str] = [*UNSHARE, "sh", "-c", mounts]
    done = subprocess.run(tried, capture_output=True, text=True, timeout=30, check=False)
    if done.returncode != 0:
        return f"namespaces with control groups of their own can't be made here: {done.stderr.strip()[-200:]}"
    return None
