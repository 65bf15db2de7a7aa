"""What keeps the daemon: systemd, control groups, limits."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Sequence
from pathlib import Path

import trio

from volant.model.doctor import Finding

from .._descriptors import ADVICE, most_vms, shortage, suffices
from ._given import Given

_NEEDED = frozenset({"cpu", "memory", "pids"})
_KNOWS_RESTART_STEPS = 254


async def systemd(given: Given) -> Sequence[Finding]:
    """Whether `volar setup` has something to set up."""
    if not given.host.exists(Path("/run/systemd/system")):
        return [judge_systemd(None)]
    env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    try:
        _, said = await given.host.run_program(["systemctl", "--version"], env=env, cwd=Path("/"), timeout_s=10)
    except (FileNotFoundError, trio.TooSlowError):
        said = b""
    return [judge_systemd(said)]


def judge_systemd(said: bytes | None) -> Finding:
    """`said`: what `systemctl --version` says; None where systemd does not run the host."""
    if said is None:
        return Finding(
            check="systemd", level="less", found="it does not run this host",
            means="VMs outlive volantd all the same; nothing restarts it when it hangs, and nothing asks guests before "
            "the host goes down",
            advice="run volantd in a terminal, or under what supervises services here",
        )  # fmt: skip
    match = re.match(rb"systemd (\d+)", said)
    if match is None:
        return Finding(
            check="systemd", level="less", found="systemctl does not tell its version",
            means="`volar setup` can't install the service", advice="run `systemctl --version` and see",
        )  # fmt: skip
    found = f"systemd {match[1].decode()}"
    if int(match[1]) < _KNOWS_RESTART_STEPS:
        return Finding(
            check="systemd", level="less", found=found,
            means="a volantd that can't start is tried each second, and not less and less often",
        )  # fmt: skip
    return Finding(check="systemd", level="ok", found=found)


def cgroups(given: Given) -> Sequence[Finding]:
    """Whether there is one hierarchy, with the controllers that bound VMs."""
    try:
        return [judge_cgroups(Path("/sys/fs/cgroup/cgroup.controllers").read_text().split())]
    except OSError:
        return [judge_cgroups(None)]


def judge_cgroups(controllers: Sequence[str] | None) -> Finding:
    """`controllers`: of the unified hierarchy; None where there is none."""
    lacking = sorted(_NEEDED - set(controllers or ()))
    if not lacking:
        return Finding(check="cgroups", level="ok", found="version 2, with cpu, memory and pids")
    found = f"version 2 without {', '.join(lacking)}" if controllers is not None else "there is no version 2"
    return Finding(
        check="cgroups", level="less", found=found,
        means="nothing bounds what all VMs take together, as `systemctl edit volant.slice` would",
        advice="boot the kernel with `systemd.unified_cgroup_hierarchy=1`" if controllers is None else "",
    )  # fmt: skip


def descriptors(given: Given) -> Sequence[Finding]:
    """How many files, sockets and pipes the daemon may have open."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return [judge_descriptors(limit, most_vms(given.settings, given.host))]


def judge_descriptors(limit: int, vms: int) -> Finding:
    """`vms`: as many as may run."""
    found = "without limit" if limit == resource.RLIM_INFINITY else f"up to {limit}"
    if suffices(limit, vms):
        return Finding(check="descriptors", level="ok", found=found)
    return Finding(check="descriptors", level="less", found=found, means=shortage(limit, vms), advice=ADVICE)
