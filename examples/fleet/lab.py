"""Hosts of a fleet on one machine: an etcd, and for each host a network namespace and a `volantd` with its own state.

All names are derived from the directory, and all processes work in it or in the namespaces. So `Lab.remove` needs no
record of what `Lab.start` has done, which may have been killed at any step.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import secrets
import shlex
import shutil
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from volant.vm import instance_of

from .network import Bridge, NetworkError, run

MAX_HOSTS = 30
_PORT, _HOSTS_PORT, _ETCD_PORT, _PEERS_PORT = 7777, 7778, 2379, 2380
_FIRST_HOST = 11
"""The last byte of the first host's address. The members of etcd are below."""
_READY_S = 120.0
_STOP_S = 20.0
_ANSWER_S = 5.0
_FIRST_UID, _UIDS = 65536, 1024
_GROUPS = Path("/sys/fs/cgroup")
_REPOSITORY = Path(__file__).resolve().parents[2]
_KEPT = ("VOLANT_ACCELERATOR", "VOLANT_LOG_LEVEL")
_Places = Mapping[str, str]
_OWN = re.compile(r"pki|(?:etcd|h)[0-9]+")
"""What the directory has."""


class LabError(Exception):
    """The hosts can't be made; the text says why."""


class Node:
    """A program in a network namespace of its own, which can be ended and started again, also by hand: the command is
    in the file `start` of its directory."""

    def __init__(self, name: str, address: str, command: Sequence[str], directory: Path) -> None:
        self.name = name
        self.address = address
        self._directory = directory
        self._log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None
        script = f"cd {shlex.quote(str(directory))}\nexport PYTHONPATH={shlex.quote(str(_REPOSITORY))}\n"
        (directory / "start").write_text(f"#!/bin/sh\n{script}exec {shlex.join(command)} >>log 2>&1\n")

    @property
    def pid(self) -> int:
        """The process. It has to have been started."""
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether the process is there."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the program without waiting."""
        # In a session of its own, as it outlives this program.
        self._process = subprocess.Popen(
            ["sh", self._directory / "start"], env=_environ(), stdin=subprocess.DEVNULL, start_new_session=True
        )

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if the process is still there."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """Kills it, and waits until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(_STOP_S)

    def check(self) -> None:
        """:raises LabError: the program has ended, with the end of what it said"""
        if not self.runs:
            said = self._log.read_text(errors="replace").strip()[-2000:]
            raise LabError(f"{self.name} has ended; the end of {self._log}:\n{said}")


class HostOfLab(Node):
    """A host, and its daemon."""

    @property
    def api(self) -> str:
        """The URL of its API."""
        return f"http://{self.address}:{_PORT}"

    @property
    def state_dir(self) -> Path:
        """What it keeps."""
        return self._directory / "state"


class Lab:
    """The hosts, and what joins them.

    :param directory: where all of it is kept; it decides the names of namespaces and of the bridge
    :param cache: with the boot image
    :param flags: more settings of each daemon
    :param openssl: the begin of the command that makes certificates
    """

    def __init__(
        self, directory: Path, cache: Path, flags: Sequence[str] = (), *, openssl: Sequence[str] = ("openssl",)
    ) -> None:
        self.directory = directory.absolute()
        self.cache = cache
        self._flags = flags
        self._openssl = openssl
        digest = hashlib.sha256(str(self.directory).encode()).hexdigest()
        self.bridge = Bridge(f"vf{digest[:6]}")
        self.members: list[Node] = []
        self.hosts: list[HostOfLab] = []

    def claim(self) -> None:
        """Makes the directory. :raises LabError: there are hosts already"""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            taken = self.bridge.exists or any(self.directory.iterdir())
            # Hypervisors are users of their own. Only they and root get further than this.
            self.directory.chmod(0o711)
        except OSError as error:
            raise LabError(f"{self.directory} can't be used: {error.strerror}") from None
        if taken:
            raise LabError(
                f"there is a fleet in {self.directory} already, or what is left of one; examples/fleet/down removes it"
            )
        (self.directory / "pki").mkdir(mode=0o700)

    def check_own(self) -> None:
        """Checks that the directory has nothing but hosts, as `remove` ends what works in it and deletes all of it.

        :raises LabError: it has something else
        """
        with suppress(FileNotFoundError):
            others = sorted(entry.name for entry in self.directory.iterdir() if not _OWN.fullmatch(entry.name))
            if others:
                raise LabError(f"{self.directory} is not the directory of a fleet: it has {others[0]!r}")

    def build(self, hosts: int, members: int) -> None:
        """Makes namespaces and certificates. :raises LabError:"""
        try:
            self.bridge.make()
            places = {f"etcd{number}": str(self.bridge.subnet[1 + number]) for number in range(1, members + 1)}
            names = {f"h{number}": str(self.bridge.subnet[_FIRST_HOST - 1 + number]) for number in range(1, hosts + 1)}
            self._make_authority()
            self._secrets_key.touch(0o600)
            self._secrets_key.write_text(f"{secrets.token_hex(32)}\n")
            for name, address in {**places, **names}.items():
                self.bridge.add(name, address)
                self._make_certificate(name, address)
            self.members = [self._member(name, places) for name in places]
            self.hosts = [self._host(number, name, names[name], places) for number, name in enumerate(names)]
        except (NetworkError, OSError) as error:
            raise LabError(str(error)) from None

    def start(self) -> None:
        """Starts everything, and returns when each host knows that all are up. :raises LabError:"""
        for node in (*self.members, *self.hosts):
            node.start()
        give_up_at = time.monotonic() + _READY_S
        waiting = list(self.hosts)
        while waiting:
            for node in (*self.members, *self.hosts):
                node.check()
            waiting = [host for host in waiting if not self._is_ready(host)]
            if waiting:
                if time.monotonic() > give_up_at:
                    raise LabError(f"{waiting[0].name} has not found its fleet within {_READY_S:g} s")
                time.sleep(0.1)

    def remove(self) -> None:
        """Ends all processes, and removes all that was made. Does nothing if there is nothing. :raises LabError:"""
        try:
            # The daemons first, and politely, as they write what is under way.
            daemons = [pid for pid in self.processes() if b"volant.daemon.main" in _Process(pid).arguments]
            self._end(daemons, signal.SIGTERM)
            self._end(daemons, signal.SIGCONT)
            self._wait_for(daemons)
            give_up_at = time.monotonic() + _STOP_S
            while left := list(self.processes()):
                if time.monotonic() > give_up_at:
                    raise LabError(f"these processes can't be killed: {', '.join(map(str, left))}")
                self._end(left, signal.SIGKILL)
                self._wait_for(left)
            for node in (*self.members, *self.hosts):
                node.kill()
            self.bridge.remove()
            for state in self.directory.glob("h*/state"):
                self.remove_traces(instance_of(state))
            with suppress(FileNotFoundError):
                shutil.rmtree(self.directory)
        except (NetworkError, OSError) as error:
            raise LabError(str(error)) from None

    # Certificates

    def _make_authority(self) -> None:
        key, certificate = self._pki("ca")
        run(
            *self._openssl, *_REQUEST, "-days", "3650", "-subj", "/CN=fleet on one machine",
            *("-addext", "keyUsage=critical,keyCertSign,cRLSign", "-keyout", str(key), "-out", str(certificate)),
        )  # fmt: skip

    def _make_certificate(self, name: str, address: str) -> None:
        """Makes one that is good for servers and clients: hosts and the gateway of etcd are both."""
        key, certificate = self._pki(name)
        authority_key, authority = self._pki("ca")
        # That of this machine, too, for a port that it passes on.
        names = f"DNS:{name},IP:{address},IP:{self.bridge.address}"
        run(
            *self._openssl, *_REQUEST, "-CA", str(authority), "-CAkey", str(authority_key),
            *("-days", "365", "-subj", "/O=fleet on one machine"),
            *("-addext", "basicConstraints=critical,CA:FALSE", "-addext", f"subjectAltName={names}"),
            *("-addext", "extendedKeyUsage=serverAuth,clientAuth", "-keyout", str(key), "-out", str(certificate)),
        )  # fmt: skip

    def _pki(self, name: str) -> tuple[Path, Path]:
        return self.directory / "pki" / f"{name}.key", self.directory / "pki" / f"{name}.pem"

    @property
    def _secrets_key(self) -> Path:
        """All hosts of a fleet encrypt secrets with the same key."""
        return self.directory / "pki" / "secrets.key"

    def client_context(self) -> ssl.SSLContext:
        """Returns the context of a client of etcd."""
        key, certificate = self._pki(self.hosts[0].name)
        context = ssl.create_default_context(cafile=self._pki("ca")[1])
        context.load_cert_chain(certificate, key)
        return context

    # Programs

    def _member(self, name: str, members: _Places) -> Node:
        key, certificate = map(str, self._pki(name))
        authority = str(self._pki("ca")[1])
        clients, peers = f"https://{members[name]}:{_ETCD_PORT}", f"https://{members[name]}:{_PEERS_PORT}"
        cluster = ",".join(f"{each}=https://{address}:{_PEERS_PORT}" for each, address in members.items())
        directory = self._directory_of(name)
        command = [
            *self.bridge.enter(name), "etcd", "--name", name, "--data-dir", str(directory / "data"),
            *("--listen-client-urls", clients, "--advertise-client-urls", clients),
            *("--cert-file", certificate, "--key-file", key, "--client-cert-auth", "--trusted-ca-file", authority),
            *("--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", cluster),
            *("--peer-cert-file", certificate, "--peer-key-file", key),
            *("--peer-client-cert-auth", "--peer-trusted-ca-file", authority),
            *("--auto-compaction-retention", "1h", "--log-level", "error"),
            # Nothing here has to survive a power cut, and a laptop's disk is slow.
            "--unsafe-no-fsync",
        ]  # fmt: skip
        return Node(name, members[name], command, directory)

    def _host(self, number: int, name: str, address: str, members: _Places) -> HostOfLab:
        key, certificate = map(str, self._pki(name))
        directory = self._directory_of(name)
        first_uid = _FIRST_UID + number * _UIDS
        command = [
            *self.bridge.enter(name), sys.executable, "-m", "volant.daemon.main",
            # This machine, and what runs in the same namespace, but no other host, whose guests have its address.
            *("--listen", f"{address}:{_PORT},127.0.0.1:{_PORT}"),
            *("--api-allow-cidr", f"{self.bridge.address}/32,127.0.0.0/8"),
            *("--state-dir", str(directory / "state"), "--runtime-dir", str(directory / "run")),
            *("--cache-dir", str(self.cache), "--vm-uids", f"{first_uid}-{first_uid + _UIDS - 1}"),
            *("--fleet-etcd", ",".join(f"https://{each}:{_ETCD_PORT}" for each in members.values())),
            *("--fleet-host", name, "--fleet-listen", f"{address}:{_HOSTS_PORT}"),
            *("--fleet-cert", certificate, "--fleet-key", key, "--fleet-ca", str(self._pki("ca")[1])),
            *("--secrets-key-file", str(self._secrets_key)),
            *self._flags,
        ]  # fmt: skip
        return HostOfLab(name, address, command, directory)

    def _directory_of(self, name: str) -> Path:
        directory = self.directory / name
        directory.mkdir(mode=0o711)
        return directory

    def _is_ready(self, host: HostOfLab) -> bool:
        """Whether a host works, and sees all others."""
        try:
            if json.loads(_get(f"{host.api}/healthz")) != {"status": "ok"}:
                return False
            up = [each["name"] for each in json.loads(_get(f"{host.api}/api/v1/hosts")) if each["state"] == "up"]
        except (OSError, ValueError, http.client.HTTPException):
            return False
        return len(up) == len(self.hosts)

    # The end

    def processes(self) -> Iterator[int]:
        """Yields the processes of all hosts: those in the namespaces, and those that work in the directory without a
        terminal: nobody's shell."""
        begin = os.fsencode(self.directory) + b"/"
        within = set(self.bridge.processes())
        for pid in sorted(int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()):
            process = _Process(pid)
            ours = pid in within or (process.cwd.startswith(begin) and not process.has_terminal)
            if ours and pid != os.getpid() and not process.has_ended:
                yield pid

    def _end(self, pids: Sequence[int], number: signal.Signals) -> None:
        """Sends a signal to those of these processes that are still ours, and not to others that have their pids."""
        with ExitStack() as stack:
            descriptors = {}
            for pid in pids:
                with suppress(ProcessLookupError):
                    descriptors[pid] = os.pidfd_open(pid)
                    stack.callback(os.close, descriptors[pid])
            ours = set(self.processes())
            for pid in descriptors.keys() & ours:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptors[pid], number)

    def _wait_for(self, pids: Sequence[int]) -> None:
        """Waits until they have ended, but not for ever."""
        give_up_at = time.monotonic() + _STOP_S
        while not all(_Process(pid).has_ended for pid in pids):
            if time.monotonic() > give_up_at:
                return
            time.sleep(0.02)

    def remove_traces(self, instance: str) -> None:
        """Removes what a killed daemon has outside of its directories, which no host has after a boot."""
        shutil.rmtree(Path("/dev/shm") / f"volant-{instance}", ignore_errors=True)
        for group in sorted(_GROUPS.glob(f"**/volant-{instance}*"), key=lambda path: -len(path.parts)):
            for inner in sorted(group.glob("**/"), key=lambda path: -len(path.parts)):
                with suppress(OSError):
                    inner.rmdir()


_REQUEST = ("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-noenc")


def _environ() -> dict[str, str]:
    """Returns the environment of programs: that of this one without settings for another daemon."""
    return {name: value for name, value in os.environ.items() if not name.startswith("VOLANT_") or name in _KEPT}


def _get(url: str) -> bytes:
    # Without the proxies of the environment, which don't know these hosts.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=_ANSWER_S) as answer:
        return bytes(answer.read())


class _Process:
    """What the kernel says of a process; of one that is gone, that it has ended."""

    def __init__(self, pid: int) -> None:
        self._directory = Path(f"/proc/{pid}")

    @property
    def cwd(self) -> bytes:
        """Its working directory, with a slash at the end."""
        try:
            return os.fsencode((self._directory / "cwd").readlink()) + b"/"
        except OSError:
            return b""

    @property
    def arguments(self) -> list[bytes]:
        """Its command line."""
        try:
            return (self._directory / "cmdline").read_bytes().split(b"\0")
        except OSError:
            return []

    @property
    def has_terminal(self) -> bool:
        """Whether it belongs to somebody's terminal."""
        return self._stat(4) != "0"

    @property
    def has_ended(self) -> bool:
        """Whether it is gone, or only its parent has to note that."""
        return self._stat(0) in ("Z", "X", "")

    def _stat(self, field: int) -> str:
        try:
            return (self._directory / "stat").read_text().rpartition(")")[2].split()[field]
        except OSError:
            return ""
