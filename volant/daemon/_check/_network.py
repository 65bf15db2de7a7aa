"""Checks the requirements for networks of VMs: a kernel that supports them, and rights to configure the host's
network."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import trio

from volant.model.doctor import Finding
from volant.network import may_configure_networks, passt_obstacle

from ._context import Context, access_advice, device, user

_PACKAGES = Path(__file__).parents[3]
_TUN = "/dev/net/tun"

_MODULES = {"bridge": "bridge", "tap": "tun", "nftables": "nf_tables"}
_NO_NETWORK = "VMs can't have the network `bridge`; the API still reaches them"
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


async def network(context: Context) -> Sequence[Finding]:
    """Checks bridges, taps, nftables, rights and passt."""
    program = [sys.executable, "-P", "-m", "volant.network._kernel_check"]
    env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "PYTHONPATH": str(_PACKAGES)}
    try:
        _, said = await context.host.processes.run(program, env=env, cwd=context.scratch, timeout_s=10)
        outcome = msgspec.json.decode(said, type=dict[str, str | None])
    except (trio.TooSlowError, ValueError):
        outcome = {"namespace": "the test program failed"}
    findings = judge_network(outcome, access_advice(_TUN) if device(_TUN) == "denied" else None)
    may = may_configure_networks()
    return [*findings, judge_rights(may), judge_passt(passt_obstacle(), filtered=may and os.geteuid() == 0)]


def judge_network(outcome: Mapping[str, str | None], access: str | None) -> list[Finding]:
    """Judges what the kernel supports.

    :param outcome: the error of each attempt, None for success; or `namespace` and the reason why none could be created
    :param access: advice for a user that may not open the device of taps
    """
    if (why := outcome.get("namespace")) is not None:
        found = f"not tested, as no network namespace can be created: {why}"
        return [
            Finding(check="network", level="less", found=found, means="the check has no result", advice="run as root")
        ]
    findings = []
    for what, error in outcome.items():
        if error is None:
            findings.append(Finding(check=what, level="ok", found="works"))
            continue
        advice = f"`sudo modprobe {_MODULES.get(what, what)}`, or boot a kernel that has it"
        if what == "tap" and access is not None:
            advice = access
        findings.append(Finding(check=what, level="less", found=error, means=_NO_NETWORK, advice=advice))
    return findings


def judge_rights(has: bool) -> Finding:
    if has:
        return Finding(check="rights", level="ok", found=f"{user()} may configure the host's network")
    return Finding(
        check="rights", level="less", found=f"{user()} may not configure the host's network (CAP_NET_ADMIN)",
        means=_NO_NETWORK, advice="run volantd as root, as the service of `sudo volar setup` does",
    )  # fmt: skip


def judge_passt(obstacle: str | None, *, filtered: bool) -> Finding:
    """Judges passt. `filtered`: whether the daemon can filter its destinations."""
    if obstacle is None and filtered:
        return Finding(check="passt", level="ok", found="passt is installed")
    if obstacle is None:
        return Finding(
            check="passt", level="less", found=f"passt is installed, but {user()} can't filter its destinations",
            means="a guest with the network `user` reaches this host's own addresses and cloud metadata services",
            advice="run volantd as root, as the service of `sudo volar setup` does",
        )  # fmt: skip
    return Finding(
        check="passt", level="less", found="passt is not installed", means="VMs can't have the network `user`",
        advice="on Debian: `sudo apt install passt`",
    )  # fmt: skip


def forwarding(context: Context) -> Sequence[Finding]:
    """Checks whether the kernel forwards packets."""
    try:
        return [judge_forwarding(_FORWARD.read_text().strip())]
    except FileNotFoundError:
        return [judge_forwarding("")]


def judge_forwarding(value: str) -> Finding:
    if value == "1":
        return Finding(check="forwarding", level="ok", found="IPv4 packets are forwarded")
    return Finding(
        check="forwarding", level="less", found="IPv4 packets are not forwarded" if value else "the host has no IPv4",
        means="a VM on the bridge reaches its gateway and VMs of its network, and nothing beyond",
        advice="`sudo sysctl -w net.ipv4.ip_forward=1`, and set it in /etc/sysctl.d for the next boot",
    )  # fmt: skip
