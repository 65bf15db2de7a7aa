"""Runs pytest, and the tests that failed once more, alone, after the others have ended. The arguments go to pytest.

One of some thousand tests on a busy machine fails now and then by chance. If it passes alone, it is named in the last
section and the run passes. A test that fails twice, more than ten failures and an interrupted run fail. CPython's
`regrtest --rerun` does the same.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

_MOST = 10
"""More failures than these are no chance."""
_TO_DEBUG = {"-x", "--exitfirst", "--pdb"}
_LINE = 300


def main(arguments: list[str]) -> int:
    """Returns the exit code of pytest, or 0 if all failed tests passed the second time."""
    with tempfile.TemporaryDirectory() as directory:
        first = Path(directory) / "first.xml"
        code = _pytest(*arguments, report=first)
        if code != 1 or _TO_DEBUG & set(arguments):
            return code
        failed = _failed(first)
        if not 0 < len(failed) <= _MOST:
            print(f"{len(failed)} tests failed: they are not run again")
            return code
        print(f"\n{len(failed)} failed: they run again, alone\n", flush=True)
        second = Path(directory) / "second.xml"
        # The cache is the one that the first run has just written.
        code = _pytest(*arguments, "--numprocesses=0", "--last-failed", "--last-failed-no-failures=none", report=second)
        if code or not failed.keys() <= _passed(second):
            return code or 1
    print(f"\nfailed once, passed alone: {len(failed)}")
    for test, line in failed.items():
        print(f"{test}\n    {line}")
    return 0


def _pytest(*arguments: str, report: Path) -> int:
    """Returns the exit code of pytest. It gets what interrupts this process, too, and cleans up."""
    options = ["--junitxml", str(report), "-o", "junit_family=xunit1"]
    with subprocess.Popen([sys.executable, "-m", "pytest", *options, *arguments]) as running:
        while True:
            try:
                return running.wait()
            except KeyboardInterrupt:
                continue


def _failed(report: Path) -> dict[str, str]:
    """Returns the tests that failed, or whose fixtures did, and the first line of each failure."""
    found: dict[str, str] = {}
    for test in ElementTree.parse(report).iter("testcase"):
        for failure in (*test.iter("failure"), *test.iter("error")):
            lines = failure.get("message", "").split("\n") + (failure.text or "").split("\n")
            found.setdefault(_name(test), next((line.strip() for line in lines if line.strip()), "")[:_LINE])
    return found


def _passed(report: Path) -> set[str]:
    tests = list(ElementTree.parse(report).iter("testcase"))
    return {_name(test) for test in tests} - {
        _name(test) for test in tests for part in test if part.tag in ("failure", "error", "skipped")
    }


def _name(test: ElementTree.Element) -> str:
    return f"{test.get('file') or test.get('classname')}::{test.get('name')}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
