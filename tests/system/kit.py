"""Runs a real `volantd`, checks that it leaves nothing behind, and offers helpers for requests to it."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import trio
from trio_websocket import WebSocketConnection, open_websocket_url

from volant.cli._boot_images import default_cache_dir
from volant.client import Client, ClientError, ClientProblem, Feed, StreamGap
from volant.client._http import RequestBody
from volant.daemon._directories import EPHEMERAL
from volant.model import CreateVm, Event, VmView
from volant.vm import instance_of

BOOT_S = 120.0
"""Deadline of a boot. A boot takes 4 s on an idle machine; this one may be busy."""
REPOSITORY = Path(__file__).resolve().parents[2]

_START_S = 60.0
_STOP_S = 60.0
_LOG_TAIL = 20_000
_GROUPS = Path("/sys/fs/cgroup")


class Daemon:
    """A `volantd` with its own state. `start`, `stop` and `kill` may be called repeatedly."""

    def __init__(
        self,
        cache: Path,
        *flags: str,
        ephemeral: bool = True,
        template: Path | None = None,
        environ: Mapping[str, str] | None = None,
        wrapper: Sequence[str] = (),
    ) -> None:
        """
        :param template: a template of another daemon, on the same filesystem as /tmp, which this daemon uses as its
            own; None: VMs boot cold
        :param wrapper: a program and its arguments, which runs the command that follows
        """
        # Short: a socket path has at most 108 bytes.
        self.root = Path(tempfile.mkdtemp(prefix="vt", dir="/tmp"))
        # Each hypervisor runs as its own user.
        self.root.chmod(0o711)
        self.state_dir = self.root / "s"
        self.runtime_dir = self.root / "r"
        self.memory_dir = Path("/dev/shm") / f"volant-{instance_of(self.state_dir)}"
        self.tag_prefix = f"volant-{instance_of(self.state_dir)}-"
        self.log_path = self.root / "volantd.log"
        self.ephemeral = ephemeral
        self.base_url = ""
        self.cwd: Path | None = None
        """Its working directory; None: the tests' own."""
        self.kept: set[str] = set()
        """Names of VMs that the fixture leaves for the next test."""
        self.process: subprocess.Popen[bytes] | None = None
        self.command = [
            *wrapper,
            *(sys.executable, "-m", "volant.daemon.main"),
            *(("--ephemeral",) if ephemeral else ()),
            *("--listen", "127.0.0.1:0", "--accelerator", "tcg"),
            # Without a warm pool; `flags` come later and win.
            *("--templates", "auto" if template else "off", "--standby", "0", "--network", "none"),
            # Tests name files where they have made them.
            *("--artifact-dirs", "/"),
            *("--state-dir", str(self.state_dir), "--runtime-dir", str(self.runtime_dir), "--cache-dir", str(cache)),
            *flags,
        ]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("VOLANT_")}
        self.environ = {**inherited, "PYTHONPATH": str(REPOSITORY), **(environ or {})}
        self.key = self.environ.get("VOLANT_API_KEY")
        if template is not None:
            self._share(template)

    def _share(self, template: Path) -> None:
        """Links the template's files: their inodes identify it, and they are never written."""
        directory = self.state_dir / "templates" / template.name
        directory.mkdir(parents=True, mode=0o700)
        self.state_dir.chmod(0o700)
        if self.ephemeral:
            # Mark the directory as made by an ephemeral daemon.
            (self.state_dir / EPHEMERAL).touch(0o600)
        for file in template.iterdir():
            (directory / file.name).hardlink_to(file)

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Volant-API-Key": self.key} if self.key else {}

    def use_key(self, key: str) -> None:
        """Sets the API key of its next start, and of clients."""
        self.key = self.environ["VOLANT_API_KEY"] = key

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def launch(self) -> None:
        """Starts it without waiting."""
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.cwd,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                # In its own session, as a service manager does it: then it may raise its weight above its guests'.
                start_new_session=True,
            )

    def start(self) -> None:
        """Starts it and waits until it listens."""
        self.launch()
        assert self.process is not None
        stdout = self.process.stdout
        assert stdout is not None
        with stdout:
            readable, _, _ = select.select([stdout], [], [], _START_S)
            line = stdout.readline().decode() if readable else ""
        assert "listening on " in line, f"volantd did not start: {line!r}\n{self.log()}"
        self.base_url = line.rpartition(" ")[2].strip()

    def terminate(self) -> None:
        """Sends SIGTERM."""
        assert self.process is not None
        self.process.terminate()

    def wait(self) -> int:
        """Waits for its exit code."""
        assert self.process is not None
        return self.process.wait(_STOP_S)

    def stop(self) -> int:
        """Sends SIGTERM; returns the exit code."""
        self.terminate()
        return self.wait()

    def kill(self) -> None:
        """Kills it with SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(_STOP_S)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def lose_database(self) -> None:
        """Kills the daemon and removes its database."""
        self.kill()
        for path in self.state_dir.glob("volant.db*"):
            path.unlink()

    def log(self) -> str:
        """Returns the end of its log."""
        try:
            return self.log_path.read_text(errors="replace")[-_LOG_TAIL:]
        except FileNotFoundError:
            return ""

    def rss_mb(self) -> float:
        """Returns the resident memory of the daemon's process."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise AssertionError("the daemon is gone")

    def hypervisors(self) -> dict[int, str]:
        """The processes of VMs, by pid: those of this host that carry this daemon's tag."""
        return {
            pid: tag
            for pid, tag in self.processes().items()
            if tag[len(self.tag_prefix)].isdigit() or (tag[len(self.tag_prefix)] == "s" and _works_for_a_vm(pid))
        }

    def processes(self) -> dict[int, str]:
        """Returns likewise all hypervisors: also those of template builds and of the warm pool."""
        return {
            pid: tag
            for pid, arguments in _processes()
            for word in arguments
            if (tag := word.removeprefix("guest=").partition(",")[0]).startswith(self.tag_prefix)
        }

    def files(self) -> list[str]:
        """Returns the runtime directories and memory files of VMs."""
        memory = [path for path in self.memory_dir.glob("*") if not path.name.startswith("template-")]
        found = [*self.runtime_dir.glob("vms/*"), *memory]
        return sorted(str(path) for path in found)

    def disks(self) -> list[str]:
        """Returns the disks of VMs."""
        return sorted(str(path) for path in self.state_dir.glob("disks/*"))

    def leftovers(self) -> list[str]:
        """Returns everything that a stopped daemon should have removed."""
        found = [f"process {pid} ({tag})" for pid, tag in self.processes().items()]
        found += self.files() + self.disks() + [str(path) for path in self.memory_dir.glob("template-*")]
        found += [str(path) for path in _GROUPS.glob(f"**/{self.tag_prefix.rstrip('-')}/*/")]
        if self.ephemeral:
            found += [str(path) for path in (self.state_dir, self.runtime_dir, self.memory_dir) if path.exists()]
        return found

    def delete_vms(self, *, but: Collection[str] = ()) -> None:
        """Deletes all VMs except those in `but`, through the API."""
        with self._clients(timeout=90) as client:
            for vm in client.get("/api/v1/vms").raise_for_status().json():
                if vm["name"] not in but:
                    answer = client.delete(f"/api/v1/vms/{vm['name']}")
                    assert answer.status_code in (204, 404), answer.text

    def check_between_tests(self) -> None:
        """Deletes the VMs of a test, and checks that the daemon is healthy and nothing is left."""
        self.delete_vms(but=self.kept)
        with self._clients(timeout=30) as client:
            # A short test may end before the daemon has started.
            deadline = time.monotonic() + 30
            while (health := client.get("/healthz").json()) == {"status": "starting"} and time.monotonic() < deadline:
                time.sleep(0.02)
            assert health == {"status": "ok"}
        hypervisors = self.hypervisors()
        assert len(hypervisors) <= len(self.kept), hypervisors
        assert len(self.files()) <= 2 * len(self.kept), self.files()
        assert len(self.disks()) <= len(self.kept), self.disks()

    def dispose(self) -> None:
        """Stops it in any state, checks that nothing is left, and removes what a test may leave."""
        try:
            if self.process is None:
                return
            if self.ephemeral:
                if self.runs:
                    assert self.stop() == 0, self.log()
            else:
                if not self.runs:
                    self.start()
                self.delete_vms()
                assert self.stop() == 0, self.log()
            left = self.leftovers()
            assert not left, f"volantd left behind: {left}"
        finally:
            self.discard()

    def discard(self) -> None:
        """Kills it and the processes that it started, and removes its directories."""
        if self.runs:
            self.kill()
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._remove_groups()
        shutil.rmtree(self.memory_dir, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)

    def _remove_groups(self) -> None:
        """Removes its control groups, as soon as the processes in them are gone."""
        name, until = self.tag_prefix.rstrip("-"), time.monotonic() + _STOP_S
        for top in (*_GROUPS.glob(f"{name}*/"), *_GROUPS.glob(f"*/{name}*/")):
            while top.exists() and time.monotonic() < until:
                for group in (*sorted(top.glob("**/"), reverse=True), top):
                    with suppress(OSError):
                        group.rmdir()
                time.sleep(0.01)

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with Client(self.base_url, api_key=self.key) as client:
            yield client

    @asynccontextmanager
    async def started(self) -> AsyncIterator[Client]:
        """Starts it, and gives a client once it has adopted its VMs."""
        self.start()
        async with self.client() as client:
            await adopted(client)
            yield client

    @asynccontextmanager
    async def http(self) -> AsyncIterator[httpx.AsyncClient]:
        """A plain HTTP client, for tests of the wire."""

        async def send_in_one_piece(request: httpx.Request) -> None:
            # httpx's own body is a generator, which a broken connection leaves half-read.
            if isinstance(request.stream, httpx.ByteStream):
                request.stream = RequestBody(request.content)

        hooks = {"request": [send_in_one_piece]}
        transport = httpx.AsyncHTTPTransport(uds=self.socket)
        async with httpx.AsyncClient(
            base_url=self._url, transport=transport, trust_env=False, timeout=60, event_hooks=hooks
        ) as client:
            yield client

    def _clients(self, timeout: float) -> httpx.Client:
        return httpx.Client(
            base_url=self._url,
            transport=httpx.HTTPTransport(uds=self.socket),
            headers=self.headers,
            trust_env=False,
            timeout=timeout,
        )

    @property
    def socket(self) -> str | None:
        """The Unix socket on which it listens; None: it listens on TCP."""
        return self.base_url.removeprefix("unix:") if self.base_url.startswith("unix:") else None

    @property
    def _url(self) -> str:
        return "http://localhost" if self.socket else self.base_url


def cache_dir() -> Path:
    """Returns the directory of the boot image: this user's default cache, unless `VOLANT_TEST_CACHE` names another.

    Root's home does not work, because hypervisors are other users, which cannot read it.
    """
    return Path(os.environ.get("VOLANT_TEST_CACHE") or default_cache_dir(os.environ, os.getuid())).absolute()


@contextmanager
def own_cache(cache: Path) -> Iterator[Path]:
    """Gives a cache with the boot images of another one and nothing else, until the block ends."""
    directory = Path(tempfile.mkdtemp(prefix="vt", dir="/tmp"))
    try:
        directory.chmod(0o711)
        (directory / "images").mkdir()
        shutil.copy(cache / "current.json", directory)
        for name in json.loads((cache / "current.json").read_text()).values():
            shutil.copytree(cache / "images" / name, directory / "images" / name)
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def patched(code: str) -> Sequence[str]:
    """Returns a `wrapper` that runs `code` in the daemon's process first, for shorter timeouts or injected errors.

    The code calls `change(owner, name, value)`, which fails where the name does not exist any more.
    """
    change = "def change(owner, name, value):\n    getattr(owner, name)\n    setattr(owner, name, value)"
    begin = "sys.argv = sys.argv[3:]\nrunpy.run_module('volant.daemon.main', run_name='__main__')"
    return (sys.executable, "-c", f"import runpy, sys\n{change}\n{code}\n{begin}")


def _processes() -> list[tuple[int, list[str]]]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
            found.append((int(entry.name), arguments))
    return found


def _works_for_a_vm(pid: int) -> bool:
    """Returns whether a process of the warm pool belongs to a VM by now."""
    try:
        return Path(f"/proc/{pid}/cwd").readlink().parent.name == "vms"
    except OSError:
        return False


def is_alive(pid: int) -> bool:
    """Returns whether the process exists and is not a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def kill_hypervisor(vm: VmView) -> None:
    """Kills the process of a VM."""
    assert vm.pid is not None
    os.kill(vm.pid, signal.SIGKILL)


def spec(name: str, **fields: Any) -> CreateVm:
    """Returns the spec of the smallest VM."""
    return CreateVm(**{"name": name, "cpu_cores": 1, "memory_mb": 128, **fields})


async def boot(client: Client, name: str, **fields: Any) -> VmView:
    """Creates a VM and waits until it runs."""
    waited = await client.vms.create_and_wait(spec(name, **fields), timeout_s=BOOT_S)
    assert waited.outcome == "met", waited
    assert waited.vm is not None
    return waited.vm


async def until(client: Client, name: str, *states: str, timeout_s: float = BOOT_S) -> VmView | None:
    """Waits for one of `states`; returns the VM."""
    waited = await client.vms.wait(name, states, timeout_s=timeout_s)
    assert waited.outcome == "met", waited
    return waited.vm


async def run(client: Client, name: str, *command: str, timeout_s: float = 60.0) -> str:
    """Runs a command in the guest, which must succeed; returns its stdout."""
    output = bytearray()
    async with client.vms.exec(name, command, timeout_s=timeout_s) as process:
        async for piece in process:
            if piece.stream == "stdout":
                output += piece.data
            else:
                print(f"{name}: {piece.data!r}")
    assert process.end is not None
    assert process.end.exit_code == 0, process.end
    return output.decode()


async def run_cut_off(client: Client, name: str, command: str) -> None:
    """Runs a command in a guest that ends the agent, or the guest."""
    try:
        await run(client, name, "sh", "-c", command)
    except (ClientError, ClientProblem, AssertionError) as error:
        print(f"as it should: {error}")
    else:
        raise AssertionError("the agent is still there")


async def next_event(feed: Feed[Event | StreamGap], *, timeout_s: float = BOOT_S) -> Event:
    """Returns the next event; a gap is a failure."""
    with trio.fail_after(timeout_s):
        event = await feed.receive()
    assert isinstance(event, Event), event
    return event


async def event_of(feed: Feed[Event | StreamGap], kind: str, name: str, *, timeout_s: float = BOOT_S) -> Event:
    """Returns the next event of that type about that VM; skips others."""
    with trio.fail_after(timeout_s):
        while True:
            event = await next_event(feed, timeout_s=timeout_s)
            if event.type == kind and event.name == name:
                return event


async def adopted(client: Client) -> None:
    """Waits until a daemon that was just started has adopted its VMs."""
    with trio.fail_after(30):
        while (await client.healthz()).status != "ok":  # noqa: ASYNC110 - the daemon offers no wait
            await trio.sleep(0.02)


async def reachable(client: Client, name: str) -> None:
    """Repeats the request until the agent answers, as the hint of a 502 says."""
    with trio.fail_after(30):
        while True:
            try:
                await client.vms.agent_health(name)
                return
            except ClientProblem as problem:
                if problem.status != 502:
                    raise
            await trio.sleep(0.02)


async def runs_on(client: Client, vm: VmView, *, boots: int = 1) -> VmView:
    """Checks that a VM runs in the process that it had, and that its agent works; returns the VM."""
    after = await client.vms.get(vm.name)
    assert (after.id, after.pid, after.status, after.boots) == (vm.id, vm.pid, "running", boots)
    await reachable(client, vm.name)
    assert await run(client, vm.name, "echo", "alive") == "alive\n"
    return after


async def healthy(client: Client, name: str) -> None:
    """Waits until the workload's health check passes."""
    with trio.fail_after(60):
        while (await client.vms.agent_health(name))["workload"]["state"] != "healthy":  # noqa: ASYNC110
            await trio.sleep(0.1)


@contextmanager
def shared_vm(daemon: Daemon, manifest: Mapping[str, Any] | None = None, **fields: Any) -> Iterator[None]:
    """Boots a VM called `demo`, which stays between tests until the block ends.

    :param manifest: of a plugin, which is installed first; then the VM is healthy, too
    """

    async def make() -> None:
        async with daemon.client() as client:
            if manifest is None:
                await boot(client, "demo", **fields)
            else:
                await client.plugins.install(manifest)
                await boot(client, "demo", plugin=manifest["name"], **fields)
                await healthy(client, "demo")

    daemon.kept.add("demo")
    trio.run(make)
    yield
    daemon.kept.clear()


@contextmanager
def kept(daemon: Daemon, running: list[Daemon]) -> Iterator[Daemon]:
    """Runs a daemon until the block ends; a failure in the block shows the daemon's log."""
    running.append(daemon)
    try:
        daemon.start()
        yield daemon
    finally:
        running.remove(daemon)
        daemon.dispose()


@asynccontextmanager
async def websocket(url: str) -> AsyncIterator[WebSocketConnection]:
    """Opens a WebSocket. trio-websocket 0.12 leaves its socket open if the server closes first."""
    connection: WebSocketConnection | None = None
    try:
        async with open_websocket_url(url) as connection:
            yield connection
    finally:
        if connection is not None:
            await trio.aclose_forcefully(connection._stream)


def load(variable: str, *, usual: int, full: int) -> int:
    """Returns the load of a test: `usual`, `full` if VOLANT_TEST_FULL is set, or the value of `variable`."""
    return int(os.environ.get(variable) or (full if os.environ.get("VOLANT_TEST_FULL") else usual))


class Stopwatch:
    """Measures the seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began
