"""The fault sites of a run: whether they fire, how often, and with which effect.

A site is a name in the program: `fault("journal.commit")`. The program declares where an action may fail, and the run
decides whether it does. Each site has its own random stream, from the seed and its name, so a new site, or another
visit, changes nothing at other sites.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from random import Random
from typing import TypeAlias, final

Effect: TypeAlias = Callable[[], object]
"""Called when a site fires. An exception that it returns is raised at the site, so it may be an exception class."""
Plan: TypeAlias = Mapping[str, float | tuple[float, Effect]]
"""Sites, or patterns such as `journal.*`, with a probability and optionally an effect."""


@dataclass(slots=True)
class SiteReport:
    """How often a run passed a site, and how often the site fired."""

    seen: int = 0
    fired: int = 0


@dataclass(slots=True)
class _Rule:
    pattern: str
    probability: float
    effect: Effect | None
    times: int | None


@final
class Faults:
    """The faults of one run. It has no public constructor: it is `Simulation.faults`."""

    def __init__(self, seed: int, noted: Callable[[str], None]) -> None:
        self._seed = seed
        self._noted = noted
        self._rules: list[_Rule] = []
        self._streams: dict[str, Random] = {}
        self._sites: dict[str, SiteReport] = {}
        self._planned: dict[str, None] = {}
        self._applying: dict[str, _Rule | None] = {}
        """The rule of each site, cached."""

    def turn_on(
        self, site: str, probability: float = 1.0, effect: Effect | None = None, *, times: int | None = None
    ) -> None:
        """Lets `site`, or every site that matches a pattern such as `journal.*`, fire with this probability.

        The rule that was turned on last counts.

        :param effect: called when the site fires. An exception that it returns is raised there: `OSError`, or
            `partial(OSError, ENOSPC, "disk full")`. Without an effect `fault()` returns True.
        :param times: the maximum number of times that it fires.
        :raises ValueError: the probability is not between 0 and 1, or `times` is below 1.
        """
        if not 0 <= probability <= 1:
            raise ValueError(f"the probability of {site} must be between 0 and 1, not {probability}")
        if times is not None and times < 1:
            raise ValueError(f"{site} fires at least once if it is turned on, so times can't be {times}")
        self._planned[site] = None
        self._rules.append(_Rule(site, probability, effect, times))
        self._applying.clear()

    def turn_off(self, site: str = "*") -> None:
        """Stops `site`, or every site that matches the pattern, from firing; without an argument, all sites."""
        self._rules.append(_Rule(site, 0.0, None, None))
        if site == "*":
            self._rules = []
        self._applying.clear()

    def plan(self, plan: Plan) -> None:
        """Calls `turn_on` for each entry.

        :raises ValueError: see `turn_on`.
        """
        for site, what in plan.items():
            if isinstance(what, tuple):
                self.turn_on(site, *what)
            else:
                self.turn_on(site, what)

    def hit(self, site: str) -> bool:
        """Decides whether `site` fires, and raises the exception that its effect returns."""
        report = self._sites.get(site)
        if report is None:
            report = self._sites[site] = SiteReport()
        report.seen += 1
        if site in self._applying:
            rule = self._applying[site]
        else:
            rule = next((rule for rule in reversed(self._rules) if fnmatchcase(site, rule.pattern)), None)
            self._applying[site] = rule
        if rule is None or rule.times == 0:
            return False
        stream = self._streams.get(site)
        if stream is None:
            stream = self._streams[site] = Random(f"{self._seed}/fault/{site}")
        if stream.random() >= rule.probability:
            return False
        report.fired += 1
        if rule.times is not None:
            rule.times -= 1
        self._noted(f"fault {site}")
        outcome = rule.effect() if rule.effect is not None else None
        if isinstance(outcome, BaseException):
            raise outcome
        return True

    def report(self) -> FaultReport:
        """Returns the sites that the run has passed, and those that fired."""
        sites = {site: SiteReport(seen.seen, seen.fired) for site, seen in sorted(self._sites.items())}
        return FaultReport(sites, tuple(sorted(self._planned)))


@dataclass(frozen=True, slots=True)
class FaultReport:
    """The sites that were passed and that fired, in one run or in several (`+`)."""

    sites: Mapping[str, SiteReport]
    planned: tuple[str, ...] = ()
    """The sites and patterns that were turned on."""

    @property
    def never_fired(self) -> tuple[str, ...]:
        """Sites that were turned on and passed, and never fired."""
        return tuple(
            site
            for site, report in self.sites.items()
            if not report.fired and any(fnmatchcase(site, pattern) for pattern in self.planned)
        )

    @property
    def never_reached(self) -> tuple[str, ...]:
        """Sites and patterns that were turned on, and never passed."""
        return tuple(pattern for pattern in self.planned if not any(fnmatchcase(site, pattern) for site in self.sites))

    @property
    def never_turned_on(self) -> tuple[str, ...]:
        """Sites that were passed, and never turned on."""
        return tuple(site for site in self.sites if not any(fnmatchcase(site, pattern) for pattern in self.planned))

    def __add__(self, other: FaultReport) -> FaultReport:
        sites: dict[str, SiteReport] = {}
        for site in sorted({*self.sites, *other.sites}):
            one, two = self.sites.get(site, _NOTHING), other.sites.get(site, _NOTHING)
            sites[site] = SiteReport(one.seen + two.seen, one.fired + two.fired)
        return FaultReport(sites, tuple(sorted({*self.planned, *other.planned})))

    def lines(self) -> Iterable[str]:
        """Returns the report as text for people."""
        width = max((len(site) for site in self.sites), default=0)
        for site, report in self.sites.items():
            yield f"{site:{width}}  seen {report.seen:>7}  fired {report.fired:>6}"
        for title, sites in (
            ("turned on, but never reached", self.never_reached),
            ("turned on and reached, but never fired", self.never_fired),
            ("never turned on", self.never_turned_on),
        ):
            if sites:
                yield f"{title}: {', '.join(sites)}"


_NOTHING = SiteReport()
