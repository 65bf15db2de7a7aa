"""Collects data for `volar debug bundle`: from the host, and from the daemon if it answers.

The sources are independent: one that fails, or takes too long, is named in the bundle's README, and the others are
still included. The size is limited, and all data passes through `Scrub`.
"""

# ruff: noqa: ASYNC240 - small files of this host, read by a program that does nothing else meanwhile

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import platform
import shlex
import subprocess
import tarfile
import time
import tomllib
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import trio

from volant import __version__
from volant.client import Client, ClientError
from volant.model import LogLine, Problem, StreamGap

from ._scrub import REMOVED, Scrub

MEMBER_BYTES = 4 * 1024 * 1024
TOTAL_BYTES = 64 * 1024 * 1024
_SOURCE_S = 15.0
_LOG_LINES = 5000
_EVENTS = 1000
_CONSOLE_LINES = 200
_INSPECTED = 200
_LISTED = 2000

_CREDENTIALS = (Path("/etc/credstore/volant-api-key"), Path("/run/credstore/volant-api-key"))
_ENVIRONMENT_FILE = Path("/etc/default/volantd")
_DIRECTORIES = (Path("/var/lib/volant"), Path("/run/volant"), Path("/var/cache/volant"))
_UNITS = ("volantd.service", "volantd.socket", "volant-guests.service", "volant.slice")
_PROPERTIES = (
    "Id,LoadState,ActiveState,SubState,Result,ExecMainStatus,ExecMainCode,NRestarts,StatusText,MainPID,FragmentPath,"
    "DropInPaths,ActiveEnterTimestamp,MemoryCurrent,MemoryMax,TasksCurrent,CPUUsageNSec,Listen,UnitFileState"
)
_HOST_FILES = (
    *("/etc/os-release", "/proc/version", "/proc/uptime", "/proc/loadavg", "/proc/meminfo", "/proc/self/cgroup"),
    *("/proc/pressure/cpu", "/proc/pressure/memory", "/proc/pressure/io", "/sys/fs/cgroup/cgroup.controllers"),
)


@dataclass
class Bundle:
    """The members so far."""

    scrub: Scrub
    members: dict[str, bytes] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """What is not in it, and why."""

    def text(self, name: str, text: str, *, tail: bool = False) -> None:
        """Adds a text; only its beginning, or with `tail` its end, if it is too long."""
        self._keep(name, self.scrub.text(text), tail)

    def document(self, name: str, value: Any) -> None:
        """Adds a JSON document."""
        plain = self.scrub.document(msgspec.to_builtins(value, str_keys=True))
        self._keep(name, json.dumps(plain, indent=2, ensure_ascii=False) + "\n", False)

    def lines(self, name: str, values: Iterable[Any]) -> None:
        """Adds JSON documents, one a line."""
        plain = (json.dumps(self.scrub.document(msgspec.to_builtins(value, str_keys=True))) for value in values)
        self._keep(name, "".join(f"{line}\n" for line in plain), True)

    def _keep(self, name: str, text: str, tail: bool) -> None:
        data = text.encode(errors="replace")
        if len(data) > MEMBER_BYTES:
            self.missing[name] = f"all but the {'last' if tail else 'first'} {MEMBER_BYTES} bytes"
            data = data[-MEMBER_BYTES:] if tail else data[:MEMBER_BYTES]
        if sum(map(len, self.members.values())) + len(data) > TOTAL_BYTES:
            self.missing[name] = "the bundle would become too large"
            return
        self.members[name] = data

    def archive(self, prefix: str) -> bytes:
        """Returns the bundle as a `.tar.gz`."""
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for name, data in {"README.txt": self._readme().encode(), **self.members}.items():
                info = tarfile.TarInfo(f"{prefix}/{name}")
                info.size, info.mode, info.mtime = len(data), 0o600, int(time.time())
                tar.addfile(info, io.BytesIO(data))
        return buffer.getvalue()

    def _readme(self) -> str:
        lines = [
            f"Written by `volar debug bundle` of Volant {__version__} on {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC.",
            "",
            f"{REMOVED} replaces what may have been a secret: keys, tokens, queries, values of labels, environments,",
            "kernel command lines and, unless they were requested, consoles. Names of VMs are included. Check the",
            "files before you share them: other texts may contain secrets too.",
            "",
            "In it:",
            *(f"  {name}  {len(data)} bytes" for name, data in self.members.items()),
            "",
            "Not in it:",
            *(f"  {name}: {self.scrub.text(why)}" for name, why in self.missing.items()),
        ]
        return "\n".join(lines) + "\n"


async def gather(client: Client, keys: list[str], log: Path | None, consoles: bool) -> Bundle:
    """Collects all sources. `log`: a file with the daemon's log, if it is not in systemd's journal."""
    bundle = Bundle(Scrub([*keys, *_known_secrets()]))

    async def source(name: str, gathers: Callable[[], Awaitable[None]]) -> None:
        try:
            with trio.fail_after(_SOURCE_S):
                await gathers()
        except trio.TooSlowError:
            bundle.missing[name] = f"it took more than {_SOURCE_S:g} s"
        except (ClientError, Problem, OSError, ValueError, subprocess.SubprocessError) as error:
            bundle.missing[name] = f"{type(error).__name__}: {error}"

    await source("versions", lambda: _versions(bundle))
    await source("host", lambda: _host(bundle))
    await source("settings", lambda: _settings(bundle))
    await source("systemd", lambda: _systemd(bundle))
    await source("log", lambda: _log(bundle, log))
    directories: tuple[Path, ...] = _DIRECTORIES
    if await _answers(client, bundle):
        daemon = _Daemon(client, bundle)
        await source("daemon/status", daemon.status)
        await source("daemon/tree", daemon.tree)
        await source("daemon/tasks", daemon.tasks)
        await source("daemon/metrics", daemon.metrics)
        await source("vms", daemon.vms)
        await source("events", daemon.events)
        if consoles:
            await source("consoles", daemon.consoles)
        directories = daemon.directories or directories
    await source("files", lambda: _files(bundle, directories))
    if not consoles:
        bundle.missing["consoles"] = "a guest may print anything; --consoles adds the last lines of crashed guests"
    return bundle


async def _answers(client: Client, bundle: Bundle) -> bool:
    try:
        with trio.fail_after(5):
            bundle.document("daemon/healthz.json", await client.healthz())
    except (ClientError, Problem, trio.TooSlowError) as error:
        bundle.missing["daemon"] = (
            str(error) or "it did not answer /healthz within 5 s; its log has all tasks after SIGUSR1"
        )
        return False
    return True


# The host


def _requirements(distribution: str) -> Iterable[str]:
    """Returns what a distribution requires; nothing for one that is not installed, as volant-client in a checkout."""
    try:
        return importlib.metadata.requires(distribution) or ()
    except importlib.metadata.PackageNotFoundError:
        return ()


async def _versions(bundle: Bundle) -> None:
    found: dict[str, object] = {"volant": __version__, "python": platform.python_version()}
    required = (_requirements(name) for name in ("volant", "volant-client"))
    for requirement in chain.from_iterable(required):
        name = requirement.split(";")[0]
        for character in " <>=!~[(":
            name = name.partition(character)[0]
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    for program in ("qemu-system-x86_64", "qemu-img", "systemctl"):
        try:
            found[program] = (await _output(program, "--version")).partition("\n")[0]
        except OSError:
            found[program] = None
    bundle.document("versions.json", found)


async def _host(bundle: Bundle) -> None:
    parts = [f"uname: {' '.join(platform.uname())}", f"CPUs: {os.cpu_count()}, usable {len(os.sched_getaffinity(0))}"]
    try:
        status = Path("/dev/kvm").stat()
        usable = os.access("/dev/kvm", os.R_OK | os.W_OK)
        parts.append(f"/dev/kvm: mode {status.st_mode:o}, uid {status.st_uid}, gid {status.st_gid}, usable: {usable}")
    except OSError as error:
        parts.append(f"/dev/kvm: {error.strerror}")
    parts.append(f"uid {os.geteuid()}, systemd runs: {Path('/run/systemd/system').is_dir()}")
    for name in _HOST_FILES:
        try:
            parts.append(f"== {name}\n{Path(name).read_text(errors='replace')[:20_000]}")
        except OSError as error:
            parts.append(f"== {name}: {error.strerror}")
    cpu = Path("/proc/cpuinfo").read_text(errors="replace").partition("\n\n")[0]
    parts.append(f"== /proc/cpuinfo, the first\n{cpu}")
    parts.append(f"== df\n{await _output('df', '-hT')}")
    bundle.text("host.txt", "\n".join(parts) + "\n")


async def _settings(bundle: Bundle) -> None:
    found: dict[str, object] = {"environment": _ours(os.environ)}
    if _ENVIRONMENT_FILE.exists():
        found[str(_ENVIRONMENT_FILE)] = _environment_file()
    if (config := _config()) is not None:
        found[str(config)] = _toml(config)
    bundle.document("settings.json", found)


async def _systemd(bundle: Bundle) -> None:
    if not Path("/run/systemd/system").is_dir():
        raise FileNotFoundError("systemd does not run here")
    shown = await _output("systemctl", "--no-pager", "show", f"--property={_PROPERTIES}", *_UNITS)
    scopes = await _output("systemctl", "--no-pager", "--plain", "list-units", "--all", "volant-*.scope")
    bundle.text("systemd.txt", f"{shown}\n{scopes}")


async def _log(bundle: Bundle, log: Path | None) -> None:
    if log is not None:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - MEMBER_BYTES))
            text = file.read(MEMBER_BYTES).decode(errors="replace")
    else:
        units = [f"--unit={unit}" for unit in _UNITS[:3]]
        text = await _output("journalctl", "--no-pager", "-q", "-o", "short-iso-precise", f"-n{_LOG_LINES}", *units)
        if not text:
            raise FileNotFoundError("systemd's journal has no log of the daemon; name its file with --log")
    bundle.text("log.txt", text, tail=True)


async def _files(bundle: Bundle, directories: tuple[Path, ...]) -> None:
    lines: list[str] = []
    for directory in directories:
        lines.append(f"== {directory}")
        for path, status in _walk(directory):
            if len(lines) >= _LISTED:
                lines.append("…")
                break
            lines.append(f"{status.st_mode:o} {status.st_uid} {status.st_size:>12} {path}")
    bundle.text("files.txt", "\n".join(lines) + "\n")


def _walk(directory: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for folder, folders, names in os.walk(directory):
        folders.sort()
        for name in sorted([*folders, *names]):
            path = Path(folder) / name
            try:
                yield path, path.lstat()
            except OSError:
                continue


async def _output(*command: str) -> str:
    """Returns a program's output. :raises OSError: it does not exist. :raises SubprocessError: it fails."""
    done = await trio.run_process(
        command, capture_stdout=True, capture_stderr=True, check=False, env={**os.environ, "LC_ALL": "C.UTF-8"}
    )
    return (done.stdout or done.stderr)[: 4 * MEMBER_BYTES].decode(errors="replace")


# Settings, and the keys in them


def _ours(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name.startswith("VOLANT_")}


def _environment_file() -> dict[str, str]:
    """Returns the variables in the service's environment file, nearly as systemd reads it."""
    found = {}
    try:
        lines = _ENVIRONMENT_FILE.read_text(errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        name, equals, value = line.strip().partition("=")
        if equals and not name.startswith(("#", ";")):
            try:
                found[name.strip()] = " ".join(shlex.split(value))
            except ValueError:
                found[name.strip()] = value
    return found


def _config() -> Path | None:
    named = os.environ.get("VOLANT_CONFIG") or _environment_file().get("VOLANT_CONFIG")
    return Path(named) if named else None


def _toml(path: Path) -> dict[str, Any]:
    """:raises OSError: it can't be read. :raises ValueError: it is no TOML."""
    return tomllib.loads(path.read_text(errors="replace"))


def _known_secrets() -> list[str]:
    """Returns the API keys that this user can read. One that it can't read can't get into the bundle from here."""
    found: list[str] = []
    files: list[str | Path] = list(_CREDENTIALS)
    sources: list[Mapping[str, Any]] = [os.environ, _environment_file()]
    config = _config()
    if config is not None:
        try:
            sources.append({f"VOLANT_{name.upper()}": value for name, value in _toml(config).items()})
        except (OSError, ValueError):
            pass
    for source in sources:
        if isinstance(key := source.get("VOLANT_API_KEY"), str):
            found.append(key.strip())
        if isinstance(file := source.get("VOLANT_API_KEY_FILE"), str) and file:
            files.append(file)
    for path in map(Path, files):
        try:
            with path.open("rb") as opened:
                lines = opened.read(64 * 1024).decode("latin-1").splitlines()
        except OSError:
            continue
        found += [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    return found


# The daemon


class _Daemon:
    def __init__(self, client: Client, bundle: Bundle) -> None:
        self._client = client
        self._bundle = bundle
        self.directories: tuple[Path, ...] = ()

    async def status(self) -> None:
        info = await self._client.system.info()
        self.directories = tuple(Path(str(info[name])) for name in ("state_dir", "runtime_dir", "cache_dir"))
        self._bundle.document("daemon/info.json", info)
        self._bundle.document("daemon/status.json", await self._client.system.status())

    async def tree(self) -> None:
        self._bundle.document("daemon/tree.json", await self._client.system.tree())

    async def tasks(self) -> None:
        self._bundle.text("daemon/tasks.txt", await self._client.system.tasks())

    async def metrics(self) -> None:
        self._bundle.text("daemon/metrics.txt", await self._client.system.metrics())

    async def vms(self) -> None:
        vms = await self._client.vms.list()
        self._bundle.document("vms.json", vms)
        self._bundle.document("orphans.json", await self._client.system.orphans())
        self._bundle.document("plugins.json", await self._client.plugins.list())
        # VMs with a reason first, then those that don't run.
        vms = sorted(vms, key=lambda vm: (vm.reason is None, vm.status == "running", vm.id))
        for vm in vms[:_INSPECTED]:
            try:
                self._bundle.document(f"inspect/{vm.name}.json", await self._client.vms.inspect(vm.name))
            except Problem as problem:
                self._bundle.missing[f"inspect/{vm.name}.json"] = problem.detail
        if len(vms) > _INSPECTED:
            self._bundle.missing["inspect"] = f"{len(vms) - _INSPECTED} VMs more"

    async def events(self) -> None:
        newest = await self._client.newest_event()
        epoch, _, number = newest.rpartition("-")
        # An event's number is no contract with clients; `volar` comes with its daemon.
        before = f"{epoch}-{max(0, int(number) - _EVENTS)}" if number.isdecimal() else "0"
        kept: deque[object] = deque(maxlen=_EVENTS)
        async with self._client.events(after=before) as feed:
            with trio.move_on_after(_SOURCE_S / 2):
                while before != newest:
                    event = await feed.receive()
                    kept.append(event)
                    before = event.oldest if isinstance(event, StreamGap) else event.id
        self._bundle.lines("events.ndjson", kept)

    async def consoles(self) -> None:
        for vm in await self._client.vms.list():
            if vm.reason is None:
                continue
            async with self._client.vms.logs(vm.name, tail=_CONSOLE_LINES, follow=False, streams=["console"]) as feed:
                lines = [line.line async for line in feed if isinstance(line, LogLine)]
            self._bundle.text(f"consoles/{vm.name}.txt", "\n".join(lines) + "\n", tail=True)
