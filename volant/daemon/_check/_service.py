"""Checks systemd, control groups, the limit of descriptors and the TLS certificate."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Sequence
from pathlib import Path

import trio

from volant.model.doctor import Finding

from .._descriptors import ADVICE, most_vms, shortage, suffices
from .._settings import SettingsError
from .._tls import RENEW, load_certificate
from ._context import Context


def tls(context: Context) -> Sequence[Finding]:
    """Checks that the certificate can be used, and its remaining lifetime."""
    settings = context.settings
    if not settings.uses_tls:
        return []
    if settings.tls_self_signed and not (settings.state_dir / "tls.pem").exists():
        return [Finding(check="tls", level="ok", found="the self-signed certificate is made at the first start")]
    try:
        certificate = load_certificate(settings)
    except SettingsError as error:
        return [Finding(check="tls", level="fails", found=str(error), means="volantd does not start")]
    assert certificate is not None
    trouble = certificate.trouble(context.host.clock.now())
    if trouble is not None:
        return [
            Finding(
                check="tls", level="less", found=trouble, means="clients refuse a certificate outside of its time",
                advice=RENEW,
            )
        ]  # fmt: skip
    return [Finding(check="tls", level="ok", found=f"a certificate until {certificate.expires_at:%Y-%m-%d}")]


_NEEDED = frozenset({"cpu", "memory", "pids"})
_RESTART_STEPS_SINCE = 254
"""The version of systemd that introduced RestartSteps=, which the unit uses."""


async def systemd(context: Context) -> Sequence[Finding]:
    """Checks whether `volar setup` can install the service."""
    if not context.host.files.exists(Path("/run/systemd/system")):
        return [judge_systemd(None)]
    env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    try:
        _, said = await context.host.processes.run(["systemctl", "--version"], env=env, cwd=Path("/"), timeout_s=10)
    except (FileNotFoundError, trio.TooSlowError):
        said = b""
    return [judge_systemd(said)]


def judge_systemd(said: bytes | None) -> Finding:
    """Judges systemd. `said` is the output of `systemctl --version`; None if systemd does not run the host."""
    if said is None:
        return Finding(
            check="systemd", level="less", found="this host does not run systemd",
            means="VMs still outlive volantd; but nothing restarts it when it hangs, and guests are not shut down "
            "before the host is",
            advice="run volantd in a terminal, or under another service manager",
        )  # fmt: skip
    match = re.match(rb"systemd (\d+)", said)
    if match is None:
        return Finding(
            check="systemd", level="less", found="systemctl does not print its version",
            means="`volar setup` can't install the service", advice="run `systemctl --version` to see why",
        )  # fmt: skip
    found = f"systemd {match[1].decode()}"
    if int(match[1]) < _RESTART_STEPS_SINCE:
        return Finding(
            check="systemd", level="less", found=found,
            means="systemd restarts a volantd that can't start every second, instead of less and less often",
        )  # fmt: skip
    return Finding(check="systemd", level="ok", found=found)


def cgroups(context: Context) -> Sequence[Finding]:
    """Checks for cgroup2 with the controllers that limit VMs."""
    try:
        return [judge_cgroups(Path("/sys/fs/cgroup/cgroup.controllers").read_text().split())]
    except OSError:
        return [judge_cgroups(None)]


def judge_cgroups(controllers: Sequence[str] | None) -> Finding:
    """Judges the controllers of cgroup2, which are None without cgroup2."""
    lacking = sorted(_NEEDED - set(controllers or ()))
    if not lacking:
        return Finding(check="cgroups", level="ok", found="cgroup2 with cpu, memory and pids")
    found = f"cgroup2 without {', '.join(lacking)}" if controllers is not None else "this host has no cgroup2"
    return Finding(
        check="cgroups", level="less", found=found,
        means="VMs together have no limits, which `systemctl edit volant.slice` would set",
        advice="boot the kernel with `systemd.unified_cgroup_hierarchy=1`" if controllers is None else "",
    )  # fmt: skip


def descriptors(context: Context) -> Sequence[Finding]:
    """Checks the limit of open files, sockets and pipes."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return [judge_descriptors(limit, most_vms(context.settings, context.host))]


def judge_descriptors(limit: int, vms: int) -> Finding:
    """Judges the limit for `vms` VMs."""
    found = "unlimited" if limit == resource.RLIM_INFINITY else f"up to {limit}"
    if suffices(limit, vms):
        return Finding(check="descriptors", level="ok", found=found)
    return Finding(check="descriptors", level="less", found=found, means=shortage(limit, vms), advice=ADVICE)
