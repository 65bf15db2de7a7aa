"""`python -m tests.bench [NAME…]` prints one figure a line; without a name it runs all but idle_fleet, clock_drift,
failover and fleet_move.

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
from ._back_to_back import back_to_back
from ._boot import create_to_agent
from ._clock_drift import clock_drift
from ._clones import creates_at_once, many_clones
from ._commands import daemon_start, volar_list
from ._crash import vm_crashed
from ._events import event_streams, unread_stream
from ._failover import failover
from ._figure import Figure
from ._first_exec import create_first_exec
from ._fleet_list import fleet_list
from ._fleet_move import fleet_move
from ._foreign import foreign, foreign_relays
from ._fork import fork_chromium
from ._hostile_guest import hostile_guest
from ._idle import idle
from ._idle_fleet import VMS, idle_fleet
from ._image_vms import image_disk, image_first_exec
from ._journal import journal, vmlog
from ._network import network
from ._networked_clone import networked_clone
from ._oci import oci_fetch
from ._printing import healthz_printing
from ._relays import relays
from ._serving import get_vm, get_vm_key, healthz, healthz_floods, healthz_handshakes
from ._streams import healthz_busy
from ._template import standby_to_agent, template_to_agent
from ._world import Skipped

Bench = Callable[[], Awaitable[list[Figure]]]

_ONLY_NAMED = {"idle_fleet", "clock_drift", "failover", "fleet_move"}
"""These run only if they are named: their options say how long they take."""
_TOTAL_S = 960.0
_BENCH_S = 180.0
"""In addition to the time for which VMs idle, and to a second for each VM that idle_fleet has more than usual."""


def main() -> int:
    """Runs the benchmarks; returns 1 if one failed or, with `--check`, missed its target."""
    benches: dict[str, Bench] = {
        "create_to_agent": create_to_agent,
        "template_to_agent": template_to_agent,
        "standby_to_agent": standby_to_agent,
        "create_first_exec": create_first_exec,
        "creates_at_once": creates_at_once,
        "back_to_back": back_to_back,
        "many_clones": many_clones,
        "fork_chromium": fork_chromium,
        "adoption": adoption,
        "idle": idle,
        "idle_fleet": idle_fleet,
        "clock_drift": clock_drift,
        "daemon_start": daemon_start,
        "volar_list": volar_list,
        "get_vm": get_vm,
        "get_vm_key": get_vm_key,
        "healthz": healthz,
        "healthz_busy": healthz_busy,
        "healthz_floods": healthz_floods,
        "healthz_handshakes": healthz_handshakes,
        "healthz_p99_printing": healthz_printing,
        "relays": relays,
        "hostile_guest": hostile_guest,
        "vm_crashed": vm_crashed,
        "event_streams": event_streams,
        "unread_stream": unread_stream,
        "journal": journal,
        "vmlog": vmlog,
        "network": network,
        "networked_clone": networked_clone,
        "oci_fetch": oci_fetch,
        "image_first_exec": image_first_exec,
        "image_disk": image_disk,
        "foreign": foreign,
        "foreign_relays": foreign_relays,
        "fleet_list": fleet_list,
        "fleet_move": fleet_move,
        "failover": failover,
    }
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(benches)}")
    parser.add_argument("--pairs", type=int, default=5, metavar="N", help="boots of each side (default: 5)")
    parser.add_argument("--idle", type=float, default=60.0, metavar="S", help="idle time of VMs (default: 60)")
    parser.add_argument("--vms", type=int, default=VMS, metavar="N", help=f"VMs of idle_fleet (default: {VMS})")
    parser.add_argument("--check", action="store_true", help="fail when a target is missed")
    options = parser.parse_args()
    if unknown := set(options.names) - set(benches):
        parser.error(f"there is no bench named {', '.join(sorted(unknown))}")
    if options.pairs < 1:
        parser.error("--pairs must be at least 1")
    benches["create_to_agent"] = partial(create_to_agent, options.pairs)
    benches["many_clones"] = partial(many_clones, options.idle)
    benches["idle_fleet"] = partial(idle_fleet, options.vms, options.idle)
    benches["clock_drift"] = partial(clock_drift, options.idle)
    names = set(options.names) or benches.keys() - _ONLY_NAMED
    wanted = {name: bench for name, bench in benches.items() if name in names}
    return trio.run(_run, wanted, options.check, options.idle + max(0, options.vms - VMS))


async def _run(benches: dict[str, Bench], check: bool, more_s: float) -> int:
    """Runs them one after the other until a signal; returns the exit code."""
    code = 130
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                # The running benchmark cleans up after itself.
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            code = await _run_all(benches, check, more_s)
            nursery.cancel_scope.cancel()
    return code


async def _run_all(benches: dict[str, Bench], check: bool, more_s: float) -> int:
    failed = False
    began = time.monotonic()
    with trio.move_on_after(_TOTAL_S + more_s) as total:
        for name, bench in benches.items():
            try:
                with trio.fail_after(_BENCH_S + more_s):
                    figures = await bench()
                for figure in figures:
                    print(figure, flush=True)
                    failed |= check and figure.missed
            except Skipped as why:
                print(f"{name} skipped: {why}", flush=True)
            except trio.TooSlowError:
                failed = True
                print(f"{name} failed: it took longer than {_BENCH_S + more_s:.0f} s", file=sys.stderr, flush=True)
            except Exception as error:
                failed = True
                print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if total.cancelled_caught:
        print(f"the rest was left out after {_TOTAL_S + more_s:.0f} s", file=sys.stderr)
        return 1
    print(f"{time.monotonic() - began:.0f} s in all", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
