"""The reports of `volantd check`, which `volar setup --check` shows, and of `volantd check-fleet`."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "less", "fails"]
"""`ok`: nothing to do. `less`: VMs run, but slower or without a feature. `fails`: no VM runs."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """The result of one check."""

    check: str
    level: Level
    found: str
    means: str = ""
    """The consequence, if it is not `ok`."""
    advice: str = ""
    """A suggestion how to fix the problem, if there is one."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The results of all checks."""

    user: str
    """The user that ran the checks. Other users may have other rights."""
    findings: list[Finding]

    @property
    def failed(self) -> list[str]:
        """The names of the checks with the level `fails`."""
        return [finding.check for finding in self.findings if finding.level == "fails"]

    @property
    def lesser(self) -> list[str]:
        """The names of the checks with the level `less`."""
        return [finding.check for finding in self.findings if finding.level == "less"]


class FleetReport(msgspec.Struct, frozen=True, kw_only=True):
    """The fleet that a host can join."""

    host: str
    """The name of the host."""
    address: str
    """The address at which other hosts reach it."""
    hosts: tuple[str, ...]
    """The names of all hosts, including this one."""
