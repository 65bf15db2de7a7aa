"""What networks of VMs are made of. Whether the kernel can is tried, in a namespace of its own; whether volantd may on
the host is a question of its capabilities."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import trio

from volant.model.doctor import Finding
from volant.network import passt_obstacle

from ._given import Given, device, let_in

_TUN = "/dev/net/tun"
_CAP_NET_ADMIN = 12
_MODULES = {"bridge": "bridge", "tap": "tun", "nftables": "nf_tables"}
_NO_NETWORK = "VMs can be given no network of their own; they are reached through the API all the same"
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")


async def network(given: Given) -> Sequence[Finding]:
    """Bridges, taps and nftables."""
    program = Path(__file__).with_name("_namespace.py")
    env = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}
    try:
        _, said = await given.host.run_program(
            [sys.executable, "-I", str(program)], env=env, cwd=given.scratch, timeout_s=10
        )
        outcome = msgspec.json.decode(said, type=dict[str, str | None])
    except (trio.TooSlowError, msgspec.DecodeError):
        outcome = {"namespace": "the attempt did not end well"}
    capabilities = _effective((await given.host.read_bytes(Path("/proc/self/status"))).decode())
    findings = judge_network(outcome, let_in(_TUN) if device(_TUN) == "denied" else None)
    may = bool(capabilities >> _CAP_NET_ADMIN & 1)
    return [*findings, judge_rights(may), judge_passt(passt_obstacle(), filtered=may and os.geteuid() == 0)]


def _effective(status: str) -> int:
    return next((int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")), 0)


def judge_network(outcome: Mapping[str, str | None], how_to_be_let_in: str | None) -> list[Finding]:
    """`outcome`: of each attempt, None where it went well; or why there was no namespace to try it in.
    `how_to_be_let_in`: to the device of taps, where this user may not open it."""
    if (why := outcome.get("namespace")) is not None:
        found = f"not tried, as no namespace can be made: {why}"
        return [Finding(check="network", level="less", found=found, means="it is not known", advice="run this as root")]
    findings = []
    for what, error in outcome.items():
        if error is None:
            findings.append(Finding(check=what, level="ok", found="can be made" if what != "nftables" else "answers"))
            continue
        advice = f"`sudo modprobe {_MODULES.get(what, what)}`; or boot a kernel that has it"
        if what == "tap" and how_to_be_let_in is not None:
            advice = how_to_be_let_in
        findings.append(Finding(check=what, level="less", found=error, means=_NO_NETWORK, advice=advice))
    return findings


def judge_rights(has: bool) -> Finding:
    if has:
        return Finding(check="rights", level="ok", found="this user may change the host's network")
    return Finding(
        check="rights", level="less", found="this user may not change the host's network (CAP_NET_ADMIN)",
        means=_NO_NETWORK, advice="run volantd as root, as the service of `sudo volar setup` does",
    )  # fmt: skip


def judge_passt(obstacle: str | None, *, filtered: bool) -> Finding:
    """`filtered`: whether its destinations can be."""
    if obstacle is None and filtered:
        return Finding(check="passt", level="ok", found="there is one")
    if obstacle is None:
        return Finding(
            check="passt", level="less", found="there is one, and its destinations can't be filtered by this user",
            means="a guest with the network `user` reaches this host's own addresses and clouds' metadata",
            advice="run volantd as root, as the service of `sudo volar setup` does",
        )  # fmt: skip
    return Finding(
        check="passt", level="less", found="it is not installed", means="VMs can't have the network `user`",
        advice="install it; Debian: `sudo apt install passt`",
    )  # fmt: skip


def forwarding(given: Given) -> Sequence[Finding]:
    """Whether the kernel passes packets on."""
    try:
        return [judge_forwarding(_FORWARD.read_text().strip())]
    except FileNotFoundError:
        return [judge_forwarding("")]


def judge_forwarding(value: str) -> Finding:
    if value == "1":
        return Finding(check="forwarding", level="ok", found="IPv4 packets are passed on")
    return Finding(
        check="forwarding", level="less", found="IPv4 packets are not passed on" if value else "there is no IPv4",
        means="a VM with a network reaches this host and its neighbours, and nothing beyond",
        advice="`sudo sysctl -w net.ipv4.ip_forward=1`, and the same in /etc/sysctl.d for the next boot",
    )  # fmt: skip
