"""Prints the part of `requirements.lock` that the named packages need, themselves included, with hashes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements.lock"


def main() -> int:
    """Prints the entries; returns the exit code."""
    needed = set(sys.argv[1:])
    entries = {match[1]: match[0] for match in re.finditer(r"^([\w.-]+)==.*\n(?: .*\n)*", LOCK.read_text(), re.M)}
    # A comment below each package names the packages that need it.
    needs = {name: set(re.findall(r"^    #(?: via|  ) ([\w.-]+)", text, re.M)) for name, text in entries.items()}
    while more := {name for name, users in needs.items() if users & needed} - needed:
        needed |= more
    print("".join(text for name, text in entries.items() if name in needed), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
