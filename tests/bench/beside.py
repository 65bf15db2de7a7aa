"""`python -m tests.bench.beside COMMIT NAME…`: benches with the daemon of an older commit and with this one, in turns.

One figure a line: this commit's median, and its ratio to the older one's. It suits benches that use the API and the
command line alone, as the older daemon is asked by the benches of today.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.kit import REPOSITORY

from ._figure import Figure, Pairs
from ._world import run, scratch

_BENCH_S = 300.0
_GIT_S = 60.0
_LINE = re.compile(r"(?P<name>\w+) (?P<value>[\d.e+-]+) (?P<unit>[^(]+?)(?: \(.*\))?")


def main() -> int:
    """Runs the benches; returns 1 if one of them failed on either side."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.beside", description=__doc__)
    parser.add_argument("commit", metavar="COMMIT")
    parser.add_argument("names", nargs="+", metavar="NAME", help="as of `python -m tests.bench`")
    parser.add_argument("--pairs", type=int, default=2, metavar="N", help="runs of each side (default: 2)")
    options = parser.parse_args()
    failed = False
    with _checkout(options.commit) as older:
        for name in options.names:
            pairs: defaultdict[tuple[str, str], Pairs] = defaultdict(Pairs)
            for number in range(options.pairs):
                # The side that comes second finds the machine as the first has left it.
                sides = (older, REPOSITORY) if number % 2 else (REPOSITORY, older)
                figures = {side: _measure(name, side) for side in sides}
                failed |= not all(figures.values())
                for figure in figures[REPOSITORY].keys() & figures[older].keys():
                    pairs[figure].add(figures[REPOSITORY][figure], figures[older][figure])
            for (figure_name, unit), pair in sorted(pairs.items()):
                to = f"{options.commit}'s {pair.other:.3g}"
                ratio = pair.ratio if all(pair.bare) else None
                print(Figure(figure_name, pair.value, unit, ratio, to), flush=True)
    return 1 if failed else 0


@contextmanager
def _checkout(commit: str) -> Iterator[Path]:
    """Checks an older commit out, until the block ends."""
    with scratch() as directory:
        path = directory / "older"
        run(["git", "-C", str(REPOSITORY), "worktree", "add", "--detach", str(path), commit], _GIT_S)
        try:
            yield path
        finally:
            run(["git", "-C", str(REPOSITORY), "worktree", "remove", "--force", str(path)], _GIT_S)


def _measure(name: str, checkout: Path) -> dict[tuple[str, str], float]:
    """Runs a bench with the daemon of a checkout; returns the values by name and unit."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", name], cwd=REPOSITORY, timeout=_BENCH_S, text=True, check=False,
        env=os.environ | {"VOLANT_BENCH_CHECKOUT": str(checkout)}, stdout=subprocess.PIPE,
    )  # fmt: skip
    lines = [_LINE.fullmatch(line) for line in done.stdout.splitlines()]
    return {(line["name"], line["unit"]): float(line["value"]) for line in lines if line}


if __name__ == "__main__":
    sys.exit(main())
