"""Makes many simulation runs on all processors: `python -m tests.simulation --seeds 300`. Prints each failure."""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

from tests.simulation.scenario import Seen, missing, run_seed

_RAM = Path("/dev/shm")
_MANY = 200
"""Fewer runs may not come across the rarest faults."""


def main() -> int:
    """Returns the exit code: 1 when a run failed, 3 when many did not, and a fault or a transition was never seen."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many (default: 300)")
    parser.add_argument("--first", type=int, default=0, help="the first one (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="at once (default: one a processor)")
    parser.add_argument("--log", action="store_true", help="show what the daemons log; for one seed")
    arguments = parser.parse_args()
    if not arguments.log:
        logging.disable(logging.CRITICAL)
    began = time.monotonic()
    seen, failed = Seen(), []
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    with multiprocessing.get_context("fork").Pool(arguments.jobs, maxtasksperchild=50) as pool:
        for seed, result in pool.imap_unordered(_one, seeds):
            if isinstance(result, Seen):
                seen += result
            else:
                failed.append(seed)
                print(f"== seed {seed}\n{result}", flush=True)
    took_s = time.monotonic() - began
    print("\n".join(seen.lines()))
    print(f"{len(seeds)} seeds, {len(failed)} failed, {took_s:.0f} s, {took_s / len(seeds):.2f} s a seed")
    if failed:
        print(f"failed: {' '.join(map(str, sorted(failed)))}")
        return 1
    unseen = missing(seen)
    if unseen:
        print(f"never seen: {', '.join(unseen)}")
        return 3 if len(seeds) >= _MANY else 0
    return 0


def _one(seed: int) -> tuple[int, Seen | str]:
    directory = Path(tempfile.mkdtemp(prefix="vt", dir=_RAM))
    try:
        return seed, run_seed(seed, directory)
    except BaseException as error:
        # An exception loses its notes, which hold the trace, on its way from a process of the pool.
        return seed, "".join(traceback.format_exception(error))
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
