"""The kernel ends processes that no VM uses before those that one does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.host.kit import SLEEP, spawn, until_output
from volant.host import Host, Sandbox
from volant.host._priorities import SPARE
from volant.model import ProcessIdentity


def score(pid: int | str) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_a_process_is_the_first_to_go_until_a_vm_uses_it(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    identity = await spawn(host, tag, tmp_path, SLEEP, started)
    assert score(identity.pid) == SPARE
    await host.limits.apply(identity, "a test")
    assert score(identity.pid) == max(0, score("self"))
    await host.limits.apply(identity, "a test")
    assert score(identity.pid) == max(0, score("self"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a process another user")
async def test_so_is_one_of_another_user(host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]) -> None:
    user = 65540
    host = Host(users=range(user, user + 1))
    identity = await host.processes.spawn(
        ["/usr/bin/python3", "-Ic", SLEEP, tag], tag=tag, env={}, cwd=tmp_path, stdout_path=tmp_path / "out",
        sandbox=Sandbox(user=user),
    )  # fmt: skip
    started.append(identity)
    await until_output(host, tmp_path / "out", b"up")
    assert host.proc.status(identity).user == user
    assert score(identity.pid) == SPARE
    await host.limits.apply(identity, "a test")
    assert score(identity.pid) == max(0, score("self"))
