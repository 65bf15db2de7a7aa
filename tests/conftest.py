"""What tests share: which need what, how they run side by side, the boot image, and daemons that leave nothing behind.

`VOLANT_TEST_CACHE` names the directory of the image; the default is where a daemon of this user has it.
`VOLANT_TEST_FULL=1` runs full loads and rounds instead of shorter ones.
"""

from __future__ import annotations

import fcntl
import os
import queue
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling

from tests.system.kit import REPOSITORY, Daemon, cache_dir, kept, spec
from volant.model import BuildTemplate

_MARKS = {
    **dict.fromkeys(("conformance", "system"), ("system",)),
    "systemd": ("system",),
    **dict.fromkeys(("attackers", "cli", "examples", "typing"), ("programs",)),
    "simulation": ("simulation",),
}
"""Folders, and the markers that all of their tests get."""
_NEEDS = ("system", "kernel", "programs", "simulation", "slow", "full")
"""A test with none of these markers is fast."""
_LONGEST = 10
_WORKER_BYTES = 1536 * 1024 * 1024
"""A worker's tests, its daemon and their guests, at most."""
_IMAGE_S = 600.0
_STOP_S = 50.0
"""For workers to clean up after an interrupt; .ci/run kills what is left after 60 s."""
# The time of an example depends on what else the machine does.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
_daemons = pytest.StashKey[list[Daemon]]()


def pytest_configure(config: pytest.Config) -> None:
    # Whoever ends the run, the daemons of its fixtures are stopped and leave nothing.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # A shell starts background jobs with these ignored; programs inherit that, and a shell can't trap them then.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    if worker := _worker(config):
        # `popen-gw0` becomes `0`: the path of a socket has at most 108 bytes.
        config.option.basetemp = str(Path(config.option.basetemp).with_name(worker.removeprefix("gw")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in _MARKS.get(item.path.parent.name, ()):
            item.add_marker(mark)
        # Every fixture with a daemon has an image, too.
        if "image_cache" in getattr(item, "fixturenames", ()):
            item.add_marker("programs")
        if item.get_closest_marker("system") and shutil.which("qemu-system-x86_64") is None:
            item.add_marker(pytest.mark.skip("there is no qemu-system-x86_64"))
        if not any(item.get_closest_marker(need) for need in _NEEDS):
            item.add_marker("fast")
    if _worker(config):
        # The longest files first, so that workers end at the same time.
        items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("alone", "system", "slow")])


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Returns some more workers than processors, but not more than memory allows."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # Tests wait for some of their time.
    workers = len(os.sched_getaffinity(0)) * 3 // 2
    return max(1, min(workers, memory // _WORKER_BYTES))


class _ByFile(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """Gives whole files to workers, whose tests share a daemon."""

    def _split_scope(self, nodeid: str) -> str:
        # Those under systemd share the host's /tmp, in which each removes what systemd has made there meanwhile.
        file = super()._split_scope(nodeid)
        return "tests/systemd" if file.startswith("tests/systemd/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByFile:
    return _ByFile(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    if not _worker(item.config):
        return (yield)
    with _machine(alone=item.get_closest_marker("alone") is not None):
        return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Waits until interrupted workers have stopped their daemons. xdist alone would kill them after some seconds."""
    controller = session.config.pluginmanager.get_plugin("dsession")
    if controller is None or exitstatus != pytest.ExitCode.INTERRUPTED:
        return
    running = set(controller._active_nodes)
    for worker in running:
        worker.shutdown()
    give_up_at = time.monotonic() + _STOP_S
    while running and time.monotonic() < give_up_at:
        with suppress(queue.Empty):
            event, arguments = controller.queue.get(timeout=0.5)
            if event in ("workerfinished", "errordown"):
                running.discard(arguments["node"])


@contextmanager
def _machine(*, alone: bool) -> Iterator[None]:
    """Holds the machine for a test, with its fixtures: shared with the tests of other workers, or alone.

    A test that waits to be alone keeps the gate closed, so that the others end and no new one starts.
    """
    with Path(__file__).open() as gate, (REPOSITORY / "pyproject.toml").open() as machine:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(machine, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        if not alone:
            fcntl.flock(gate, fcntl.LOCK_UN)
        try:
            yield
        finally:
            # Not by closing: a process that a test has forked may have the files, too.
            fcntl.flock(machine, fcntl.LOCK_UN)
            fcntl.flock(gate, fcntl.LOCK_UN)


def _worker(config: pytest.Config) -> str | None:
    """Returns the name of this worker of xdist; None: this process is none."""
    worker: str | None = getattr(config, "workerinput", {}).get("workerid")
    return worker


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints where the time went, in seconds of workers, and what was skipped and why."""
    tests, folders = defaultdict[str, float](float), defaultdict[str, list[float]](list)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                tests[report.nodeid] += report.duration
    for test, seconds in tests.items():
        folders[str(Path(test.partition("::")[0]).parent)].append(seconds)
    if len(folders) > 1:
        terminalreporter.section(f"{sum(tests.values()):.0f} s in {len(tests)} tests")
        for folder, each in sorted(folders.items(), key=lambda found: -sum(found[1])):
            terminalreporter.write_line(f"{sum(each):7.1f} s {len(each):5} {folder}")
        terminalreporter.section("longest tests")
        for test, seconds in sorted(tests.items(), key=lambda found: -found[1])[:_LONGEST]:
            terminalreporter.write_line(f"{seconds:7.1f} s {test}")
    reports = terminalreporter.getreports("skipped")
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    if reasons:
        terminalreporter.section("skipped")
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count:5} {reason}")


@pytest.fixture(scope="session")
def image_cache() -> Path:
    """A cache directory with an up-to-date boot image in it."""
    cache = cache_dir()
    subprocess.run(
        [sys.executable, "-m", "volant.images", "build", "--cache", str(cache)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
        timeout=_IMAGE_S,
    )
    return cache


@pytest.fixture(scope="session")
def browser_plugin(image_cache: Path) -> Path:
    """The manifest of `examples/browser`, with its root filesystem beside it; built once for each cache."""
    output = image_cache / "browser"
    subprocess.run(
        [sys.executable, str(REPOSITORY / "examples" / "browser" / "build.py"), "--output", str(output)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=True,
        timeout=_IMAGE_S,
    )
    return output / "manifest.json"


@pytest.fixture(scope="session", autouse=True)
def _running(request: pytest.FixtureRequest) -> list[Daemon]:
    """The running daemons, whose logs a failure shows."""
    daemons: list[Daemon] = []
    request.session.stash[_daemons] = daemons
    return daemons


@pytest.fixture(scope="session")
def template(image_cache: Path, _running: list[Daemon]) -> Iterator[Path]:
    """A template of the smallest VM, which the daemons of tests find as if they had built it."""

    async def build(daemon: Daemon) -> str:
        smallest = spec("any")
        wanted = BuildTemplate(cpu_cores=smallest.cpu_cores, memory_mb=smallest.memory_mb)
        async with daemon.client() as client:
            digest: str = (await client.templates.build(wanted)).digest
            return digest

    with kept(Daemon(image_cache, "--templates", "auto", ephemeral=False), _running) as daemon:
        digest = trio.run(build, daemon)
        assert daemon.stop() == 0
        yield daemon.state_dir / "templates" / digest


def _template(request: pytest.FixtureRequest) -> Path | None:
    """Returns the template of a test's or a module's VMs; None: they boot cold."""
    if request.node.get_closest_marker("cold"):
        return None
    found: Path = request.getfixturevalue("template")
    return found


@pytest.fixture(scope="module")
def module_daemon(request: pytest.FixtureRequest, image_cache: Path, _running: list[Daemon]) -> Iterator[Daemon]:
    """One ephemeral daemon for the tests of a module; use `daemon`, which cleans up after each."""
    with kept(Daemon(image_cache, template=_template(request)), _running) as daemon:
        yield daemon


@pytest.fixture
def daemon(module_daemon: Daemon) -> Iterator[Daemon]:
    """The daemon of the module, without VMs except those in `kept`."""
    yield module_daemon
    module_daemon.check_between_tests()


@pytest.fixture
def make_daemon(
    request: pytest.FixtureRequest, image_cache: Path, _running: list[Daemon]
) -> Iterator[Callable[..., Daemon]]:
    """Starts a daemon for this test alone; takes the arguments of `Daemon`."""
    made: list[Daemon] = []
    template = _template(request)

    def make(*flags: str, **options: Any) -> Daemon:
        daemon = Daemon(image_cache, *flags, template=template, **options)
        made.append(daemon)
        _running.append(daemon)
        daemon.start()
        return daemon

    try:
        yield make
    finally:
        for daemon in made:
            _running.remove(daemon)
        failures = []
        for daemon in made:
            try:
                daemon.dispose()
            except Exception as failure:
                failures.append(failure)
        if failures:
            raise failures[0]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    error = call.excinfo.value if call.excinfo else None
    # pytest takes an interrupt in an exception group, as Trio raises it, for an ordinary failure.
    if isinstance(error, BaseExceptionGroup) and error.subgroup(KeyboardInterrupt):
        item.session.shouldstop = "interrupted"
    if report.failed:
        for daemon in item.session.stash.get(_daemons, []):
            report.sections.append((f"volantd in {daemon.root}", daemon.log()))
    return report
