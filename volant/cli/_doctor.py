"""`volar setup --check`: runs `volantd check` and prints its findings.

The daemon's program runs the checks under the conditions of the daemon. It is the program that `volar setup` would
install: from this installation, with the service's settings if there are any.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain

import msgspec

from volant.model.doctor import Report

from ._output import Output, styled
from ._run import Failure
from ._text import safe

_COLOURS = {"ok": "green", "less": "yellow", "fails": "red"}
_TIMEOUT_S = 60.0
"""Longer than the longest deadline of a check in volantd, 25 s."""
_WRONG_SETTINGS = 2


def check(out: Output, program: Sequence[str], settings: Mapping[str, str]) -> int:
    """Prints the findings; returns the exit code.

    :param settings: the service's settings; the environment overrides them
    :raises Failure: volantd failed
    """
    report = _ask(program, {**settings, **os.environ})
    if out.json:
        out.document({"ok": not report.failed, "user": report.user, "findings": report.findings})
    else:
        _lay_out(out, report)
    return 1 if report.failed else 0


def _ask(program: Sequence[str], environ: Mapping[str, str]) -> Report:
    try:
        done = subprocess.run(
            [*program, "check"], env=environ, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise Failure(f"`{' '.join(program)} check` takes longer than {_TIMEOUT_S:g} s") from None
    message = done.stderr.decode(errors="replace").strip()
    if done.returncode == _WRONG_SETTINGS:
        raise Failure(message.removeprefix("volantd: "), hint="fix the settings: volantd would not start with them")
    try:
        return msgspec.json.decode(done.stdout, type=Report)
    except (ValueError, RecursionError):
        raise Failure(f"`{' '.join(program)} check` failed with {done.returncode}: {message[-1000:]}") from None


def _lay_out(out: Output, report: Report) -> None:
    width = shutil.get_terminal_size((100, 24)).columns if sys.stdout.isatty() else 0
    column = max((len(finding.check) for finding in report.findings), default=0)
    margin = " " * (5 + 2 + column + 2)
    for finding in report.findings:
        paragraphs = (finding.found, finding.means, f"→ {finding.advice}" if finding.advice else "")
        first, *rest = chain.from_iterable(_wrapped(text, width - len(margin)) for text in paragraphs)
        level = styled(finding.level.ljust(5), _COLOURS[finding.level], sys.stdout)
        out.line(f"{level}  {safe(finding.check).ljust(column)}  {first}")
        for line in rest:
            out.line(f"{margin}{line}")
    out.line("")
    who = safe(report.user)
    if report.failed:
        out.line(f"VMs can't run here with volantd as {who}: {safe(', '.join(report.failed))}")
    elif report.lesser:
        out.line(f"VMs can run here with volantd as {who}, with limits: {safe(', '.join(report.lesser))}")
    else:
        out.line(f"VMs can run here with volantd as {who}")


def _wrapped(text: str, width: int) -> list[str]:
    """Wraps text to `width`; returns one line if that is too small, for example in a pipe."""
    if not text:
        return []
    return textwrap.wrap(safe(text), width, break_long_words=False) if width >= 20 else [safe(text)]
