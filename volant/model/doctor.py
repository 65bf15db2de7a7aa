"""What is found of a host on which VMs are to run: `volantd check` says it, `volar setup --check` shows it."""

from __future__ import annotations

from typing import Literal

import msgspec

Level = Literal["ok", "less", "fails"]
"""`ok`: as it should be. `less`: VMs run, and something is slower, or left out. `fails`: without it none runs."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at."""

    check: str
    level: Level
    found: str
    means: str = ""
    """What comes of it, where it is not `ok`."""
    advice: str = ""
    """What to do, where something can be done."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """All that was looked at."""

    user: str
    """As whom: others may be allowed other things."""
    findings: list[Finding]

    @property
    def failed(self) -> list[str]:
        """The names of what fails."""
        return [finding.check for finding in self.findings if finding.level == "fails"]

    @property
    def lesser(self) -> list[str]:
        """The names of what is less than it could be."""
        return [finding.check for finding in self.findings if finding.level == "less"]
