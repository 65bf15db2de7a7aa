"""The boot image, built once, and daemons whose end is checked.

`VOLANT_TEST_CACHE` names the directory of the image; the default is where a daemon of this user has it.
`VOLANT_TEST_FULL=1` takes the loads and rounds that the promises speak of, instead of shorter ones.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, settings

from tests.system.kit import REPOSITORY, Daemon, cache_dir, kept, spec
from volant.model import BuildTemplate

_REAL = frozenset({"system", "conformance", "systemd"})
"""Folders whose tests boot real guests."""
_IMAGE_S = 600.0
# How long an example takes says more of what else the machine does.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")
_daemons = pytest.StashKey[list[Daemon]]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name in _REAL:
            item.add_marker(pytest.mark.system)
            if shutil.which("qemu-system-x86_64") is None:
                item.add_marker(pytest.mark.skip("there is no qemu-system-x86_64"))


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
    """The manifest of `examples/browser`, its root filesystem beside it; made once for a cache."""
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
    """The daemons that may have something to say about a failure."""
    daemons: list[Daemon] = []
    request.session.stash[_daemons] = daemons
    return daemons


@pytest.fixture(scope="session")
def template(image_cache: Path, _running: list[Daemon]) -> Iterator[Path]:
    """A template of the smallest VM, which daemons of tests find as if they had been here before."""

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
    """What VMs of a test or a module begin from; None: they boot cold."""
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
    """A daemon without VMs, but those of its module that it says to keep."""
    yield module_daemon
    module_daemon.check_between_tests()


@pytest.fixture
def make_daemon(
    request: pytest.FixtureRequest, image_cache: Path, _running: list[Daemon]
) -> Iterator[Callable[..., Daemon]]:
    """Daemons of a test's own; takes the arguments of `Daemon`, and starts it."""
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


def pytest_configure() -> None:
    # Whoever ends the run, the daemons of its fixtures are ended and leave nothing.
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[Any]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    error = call.excinfo.value if call.excinfo else None
    # In a group, as Trio has it, pytest takes it for a failure as any other.
    if isinstance(error, BaseExceptionGroup) and error.subgroup(KeyboardInterrupt):
        item.session.shouldstop = "interrupted"
    if report.failed:
        for daemon in item.session.stash.get(_daemons, []):
            report.sections.append((f"volantd in {daemon.root}", daemon.log()))
    return report
