"""`python -m tests.bench [NAME…]` prints one figure a line.

Quote the ratios of one run, and an absolute figure only with its machine. Nothing else should run meanwhile: the sides
of a pair alternate, which evens out a drift, but not a burst.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from ._adoption import adoption
from ._boot import create_to_agent
from ._clones import creates_at_once, many_clones
from ._commands import daemon_start, volar_list
from ._events import event_streams, unread_stream
from ._figure import Figure
from ._first_exec import create_first_exec
from ._fork import fork_chromium
from ._hostile_guest import hostile_guest
from ._idle import idle
from ._journal import journal, vmlog
from ._network import network
from ._networked_clone import networked_clone
from ._printing import healthz_printing
from ._relays import relays
from ._serving import get_vm, healthz
from ._streams import healthz_busy
from ._template import standby_to_agent, template_to_agent
from ._world import Skipped

Bench = Callable[[], Awaitable[list[Figure]]]

_TOTAL_S = 780.0
_BENCH_S = 180.0
"""In addition to the time for which many clones idle."""


def main() -> int:
    """Runs the benchmarks; returns 1 if one failed or, with `--check`, missed its target."""
    benches: dict[str, Bench] = {
        "create_to_agent": create_to_agent,
        "template_to_agent": template_to_agent,
        "standby_to_agent": standby_to_agent,
        "create_first_exec": create_first_exec,
        "creates_at_once": creates_at_once,
        "many_clones": many_clones,
        "fork_chromium": fork_chromium,
        "adoption": adoption,
        "idle": idle,
        "daemon_start": daemon_start,
        "volar_list": volar_list,
        "get_vm": get_vm,
        "healthz": healthz,
        "healthz_busy": healthz_busy,
        "healthz_p99_printing": healthz_printing,
        "relays": relays,
        "hostile_guest": hostile_guest,
        "event_streams": event_streams,
        "unread_stream": unread_stream,
        "journal": journal,
        "vmlog": vmlog,
        "network": network,
        "networked_clone": networked_clone,
    }
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(benches)}; all by default")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="boots of each side (default: 5)")
    parser.add_argument("--idle", type=float, default=60.0, metavar="S", help="idle time of many clones (default: 60)")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    options = parser.parse_args()
    if unknown := set(options.names) - set(benches):
        parser.error(f"there is no bench named {', '.join(sorted(unknown))}")
    if options.pairs < 1:
        parser.error("--pairs must be at least 1")
    benches["create_to_agent"] = partial(create_to_agent, options.pairs)
    benches["many_clones"] = partial(many_clones, options.idle)
    wanted = {name: bench for name, bench in benches.items() if not options.names or name in options.names}
    return trio.run(_run, wanted, options.check, options.idle)


async def _run(benches: dict[str, Bench], check: bool, idle_s: float) -> int:
    """Runs them one after the other until a signal; returns the exit code."""
    code = 130
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                # The running benchmark cleans up after itself.
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            code = await _run_all(benches, check, idle_s)
            nursery.cancel_scope.cancel()
    return code


async def _run_all(benches: dict[str, Bench], check: bool, idle_s: float) -> int:
    failed = False
    began = time.monotonic()
    with trio.move_on_after(_TOTAL_S + idle_s) as total:
        for name, bench in benches.items():
            try:
                with trio.fail_after(_BENCH_S + idle_s):
                    figures = await bench()
                for figure in figures:
                    print(figure, flush=True)
                    failed |= check and figure.missed
            except Skipped as why:
                print(f"{name} skipped: {why}", flush=True)
            except trio.TooSlowError:
                failed = True
                print(f"{name} failed: it took longer than {_BENCH_S + idle_s:.0f} s", file=sys.stderr, flush=True)
            except Exception as error:
                failed = True
                print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if total.cancelled_caught:
        print(f"the rest was left out after {_TOTAL_S + idle_s:.0f} s", file=sys.stderr)
        return 1
    print(f"{time.monotonic() - began:.0f} s in all", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
