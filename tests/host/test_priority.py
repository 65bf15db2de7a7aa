"""The daemon's session gets more processor time than hypervisors where the kernel shares it among sessions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from volant.host import Host
from volant.host._priorities import LOWERED, OWN

AUTOGROUP = Path("/proc/self/autogroup")

pytestmark = pytest.mark.skipif(not AUTOGROUP.exists(), reason="the kernel has no autogroups")

RAISES = "from volant.host import raise_own\nprint(raise_own(), open('/proc/self/autogroup').read().strip())"


def said(*, leads: bool) -> tuple[str, str]:
    """Whether a new process raised its session, and what the kernel says of that: nothing, where nobody began one."""
    done = subprocess.run(
        [sys.executable, "-c", RAISES], start_new_session=leads, capture_output=True, text=True, check=True, timeout=30,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )  # fmt: skip
    raised, _, shown = done.stdout.strip().partition(" ")
    return raised, shown


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may raise it")
def test_a_daemon_that_leads_its_session_raises_that() -> None:
    raised, shown = said(leads=True)
    assert (raised, shown.split()[-1]) == ("True", str(OWN))


def test_a_session_with_other_programs_is_left_alone() -> None:
    assert said(leads=False) == ("False", AUTOGROUP.read_text().strip())


@pytest.mark.parametrize("lowers", [True, False])
async def test_a_daemon_that_may_not_raise_itself_lowers_its_hypervisors(tmp_path: Path, lowers: bool) -> None:
    host = Host(lowers=lowers)
    tag = f"volant-test.{host.random.new_id()}"
    identity = await host.processes.spawn(
        [sys.executable, "-c", "import time; time.sleep(60)", tag],
        tag=tag,
        env={},
        cwd=tmp_path,
        stdout_path=tmp_path / "out",
    )
    try:
        with trio.fail_after(20):
            await host.limits.apply(identity, "a test")
        weight = await host.files.read(Path(f"/proc/{identity.pid}/autogroup"))
        assert weight.split()[-1] == (str(LOWERED) if lowers else "0").encode()
    finally:
        await host.processes.end([identity])
