"""A pytest plugin for simulated tests, in addition to pytest-trio.

A test with the mark `simulated` is an async function of a `Simulation`. It runs once for each seed, and so does a
function that a plain test passes to the fixture `simulations`. One test is one item, whatever the number of seeds: two
hundred items would cost more than two hundred runs.

The plugin takes part in all test runs where it is installed, so until it finds such a test it imports nothing.
"""

from __future__ import annotations

import inspect
import shlex
import sys
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

if TYPE_CHECKING:
    from ._faults import Plan
    from ._simulate import Simulation

T = TypeVar("T")

MARK = "simulated"
DEFAULT_SEEDS = 10
_REPORT = "actors_simulations"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declares the options."""
    group = parser.getgroup("actors", "simulated tests")
    group.addoption(
        "--sim-seed",
        type=int,
        action="append",
        metavar="N",
        help="run simulated tests with this seed alone (may be repeated): replays a run that failed",
    )
    group.addoption(
        "--sim-seeds", type=int, metavar="N", help="run simulated tests with N seeds each, whatever they say themselves"
    )
    group.addoption(
        "--sim-check",
        action="store_true",
        help="run each simulation twice, and fail at the first difference between the two",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Declares the marker, and checks the options."""
    config.addinivalue_line(
        "markers",
        f"{MARK}(seeds={DEFAULT_SEEDS}, faults=None, limit_s=86400, limit_steps=1000000): "
        "run the async test, which takes `sim`, on virtual time, once for each seed",
    )
    seeds = config.getoption("--sim-seeds")
    if seeds is not None and seeds < 1:
        raise pytest.UsageError(f"--sim-seeds must be at least 1, not {seeds}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Takes simulated tests from pytest-trio, which marks every async test in its trio_mode."""
    for item in items:
        if item.get_closest_marker(MARK) is not None and item.get_closest_marker("trio") is not None:
            item.own_markers[:] = [mark for mark in item.own_markers if mark.name != "trio"]


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a simulated test."""
    mark = pyfuncitem.get_closest_marker(MARK)
    if mark is None:
        return None
    test = pyfuncitem.obj
    if not inspect.iscoroutinefunction(test):
        pytest.fail(f"a test that is marked {MARK} is an async function; a plain one uses the fixture `simulations`")
    names = pyfuncitem._fixtureinfo.argnames
    if "sim" not in names:
        pytest.fail(f"a test that is marked {MARK} takes `sim`, its Simulation")
    if mark.args:
        pytest.fail(f"{MARK} takes its arguments by name")
    arguments = {name: pyfuncitem.funcargs[name] for name in names}

    async def main(sim: Simulation) -> None:
        await test(**{**arguments, "sim": sim})

    Simulations(pyfuncitem).run(main, **mark.kwargs)
    return True


class Simulations:
    """Runs a simulation for each seed of the test or of the command line."""

    def __init__(self, item: pytest.Item) -> None:
        self._item = item
        self._figures: dict[str, Any] = {"runs": 0, "virtual_s": 0.0, "sites": {}, "planned": [], "replay": None}
        setattr(item, _REPORT, self._figures)

    def seeds(self, seeds: int | Sequence[int] = DEFAULT_SEEDS) -> Sequence[int]:
        """Returns the seeds that run when a test asks for `seeds`: a number of seeds from 0 on, or a sequence."""
        chosen: list[int] | None = self._item.config.getoption("--sim-seed")
        if chosen is not None:
            return chosen
        number: int | None = self._item.config.getoption("--sim-seeds")
        if number is not None:
            return range(number)
        return range(seeds) if isinstance(seeds, int) else seeds

    def run(
        self,
        main: Callable[[Simulation], Awaitable[T]],
        *,
        seeds: int | Sequence[int] = DEFAULT_SEEDS,
        faults: Plan | None = None,
        limit_s: float = 86_400.0,
        limit_steps: int = 1_000_000,
    ) -> list[T]:
        """Runs `main` with each seed, and returns the results. A failure has a note with the command to replay it.

        :param seeds: a number of seeds from 0 on, or a sequence; `--sim-seed` and `--sim-seeds` override it.

        For the other parameters see `simulate`.
        """
        __tracebackhide__ = True
        from ._simulate import check_deterministic, simulate

        check = bool(self._item.config.getoption("--sim-check"))
        returned: list[T] = []
        limits = {"limit_s": limit_s, "limit_steps": limit_steps}
        for seed in self.seeds(seeds):
            seen: list[Simulation] = []

            async def watched(sim: Simulation, seen: list[Simulation] = seen) -> T:
                seen.append(sim)
                return await main(sim)

            try:
                if check:
                    check_deterministic(watched, seed=seed, faults=faults, **limits)  # type: ignore[arg-type]  # two types
                returned.append(simulate(watched, seed=seed, faults=faults, **limits))  # type: ignore[arg-type]  # two types
            except Exception as exc:
                replay = self._replay(seed, check)
                self._figures["replay"] = replay
                exc.add_note(f"Replay it with: {replay}")
                raise
            finally:
                for sim in seen[-1:]:
                    self._count(sim)
        return returned

    def _count(self, sim: Simulation) -> None:
        figures, report = self._figures, sim.faults.report()
        figures["runs"] += 1
        figures["virtual_s"] += sim.now_s
        figures["planned"] = sorted({*figures["planned"], *report.planned})
        for site, counts in report.sites.items():
            seen, fired = figures["sites"].get(site, (0, 0))
            figures["sites"][site] = [seen + counts.seen, fired + counts.fired]

    def _replay(self, seed: int, check: bool) -> str:
        also = " --sim-check" if check else ""
        return f"{_python()} -m pytest {shlex.quote(self._item.nodeid)} --sim-seed {seed}{also}"


def _python() -> str:
    return "python" if sys.prefix != sys.base_prefix else "python3"


@pytest.fixture
def sim() -> Any:
    """Returns the `Simulation` of each run in a test with the mark `simulated`."""
    return None


@pytest.fixture
def simulations(request: pytest.FixtureRequest) -> Simulations:
    """Runs simulations in a plain test: `simulations.run(main, seeds=50)`."""
    return Simulations(request.node)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """Adds the figures of a test's runs to its report, which may travel to another process."""
    report: Any = yield
    figures = getattr(item, _REPORT, None)
    if figures is not None and call.when == "call":
        setattr(report, _REPORT, figures)
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Prints the number of runs, the fault sites, and how to replay failures."""
    reports = [
        getattr(report, _REPORT)
        for category in ("passed", "failed", "xfailed", "xpassed")
        for report in terminalreporter.stats.get(category, ())
        if getattr(report, _REPORT, None) is not None
    ]
    if not any(report["runs"] for report in reports):
        return
    from ._faults import FaultReport, SiteReport

    runs = sum(report["runs"] for report in reports)
    virtual_s = sum(report["virtual_s"] for report in reports)
    faults = FaultReport({}, ())
    for report in reports:
        sites = {site: SiteReport(*counts) for site, counts in report["sites"].items()}
        faults += FaultReport(sites, tuple(report["planned"]))
    terminalreporter.section("simulations")
    terminalreporter.line(f"{runs:,} runs, {virtual_s:,.0f} virtual seconds")
    for line in faults.lines():
        terminalreporter.line(line)
    for report in reports:
        if report["replay"]:
            terminalreporter.line(f"replay: {report['replay']}")
