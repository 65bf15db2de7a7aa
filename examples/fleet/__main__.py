"""`examples/fleet/up` and `examples/fleet/down`: a fleet of hosts on one machine, each in a network of its own.

`up` prints `{"hosts": [{"name", "api", "pid"}]}` and nothing else on stdout. `FLEET_DIRECTORY` is where all of it is.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from volant import images
from volant.cli._boot_images import default_cache_dir

from .lab import MAX_HOSTS, Lab, LabError

DIRECTORY = Path("/run/volant-fleet")
"""As processes and namespaces, it is gone when the machine is started again."""
_PROGRAMS = {"etcd": "etcd-server", "ip": "iproute2", "openssl": "openssl", "qemu-system-x86_64": "qemu-system-x86"}
_IMAGE_S = 600.0


def main() -> int:
    """Starts or removes the fleet; returns the exit code."""
    options = _options()
    signal.signal(signal.SIGTERM, _interrupted)
    signal.signal(signal.SIGHUP, _interrupted)
    try:
        _check_host()
        lab = Lab(Path(os.environ.get("FLEET_DIRECTORY") or DIRECTORY), default_cache_dir(os.environ, 0))
        if options.command == "down":
            lab.check_own()
            lab.remove()
            return 0
        return _up(lab, options.hosts, options.etcd)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="examples/fleet", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", prog="examples/fleet/up", help="start the fleet", description="Start the fleet.")
    up.add_argument("--hosts", type=int, choices=range(1, MAX_HOSTS + 1), default=3, metavar="N", help="(default: 3)")
    up.add_argument("--etcd", type=int, choices=(1, 3, 5), default=1, help="members of its cluster (default: 1)")
    commands.add_parser(
        "down", prog="examples/fleet/down", help="remove the fleet", description="Remove the fleet, with all VMs."
    )
    return parser.parse_args()


def _up(lab: Lab, hosts: int, members: int) -> int:
    lab.claim()
    try:
        if images.find(lab.cache) is None:
            # Here, as hosts reach only each other.
            subprocess.run(
                [sys.executable, "-m", "volant.images", "build", "--cache", str(lab.cache)],
                check=True, stdout=sys.stderr, timeout=_IMAGE_S,
            )  # fmt: skip
        lab.build(hosts, members)
        lab.start()
    except BaseException as error:
        if isinstance(error, subprocess.SubprocessError):
            error = LabError(str(error))
        print("removing what was made", file=sys.stderr)
        lab.remove()
        raise error from None
    print(json.dumps({"hosts": [{"name": host.name, "api": host.api, "pid": host.pid} for host in lab.hosts]}))
    return 0


def _check_host() -> None:
    """:raises LabError: this user, or this machine, can't do it."""
    if os.geteuid() != 0:
        raise LabError("only root can make network namespaces; run it with sudo")
    os.environ["PATH"] += ":/usr/sbin:/sbin"
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            raise LabError(f"there is no {program} on this machine (apt-get install {package})")


def _interrupted(signum: int, frame: object) -> None:
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
