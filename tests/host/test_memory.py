"""The memory of the machine and of processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
import trio.testing

from tests.host.kit import SLEEP, spawn, until_output
from volant.host import Host, ProcessGone
from volant.model import ProcessIdentity


async def test_the_memory_usage_of_a_process_is_measured(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity]
) -> None:
    identity = await spawn(host, tag, tmp_path, "x = b'x' * 2**26\n" + SLEEP, started)
    await until_output(host, tmp_path / "out", b"up")
    found = await host.process_memory.usage(identity, 10)
    assert 2**16 <= found.private_kb <= found.pss_kb <= found.rss_kb < 2**18
    assert abs(found.private_kb + found.shared_kb - found.rss_kb) <= 64
    with host.processes.open(identity) as process:
        process.kill()
        await process.wait()
    with pytest.raises(ProcessGone):
        await host.process_memory.usage(identity, 10)


async def test_measuring_the_memory_of_a_hanging_process_ends_at_the_deadline(
    host: Host, tag: str, tmp_path: Path, started: list[ProcessIdentity], monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = await spawn(host, tag, tmp_path, SLEEP, started)
    rollup = tmp_path / str(identity.pid) / "smaps_rollup"
    rollup.parent.mkdir()
    os.mkfifo(rollup)
    monkeypatch.setattr("volant.host._process_memory._PROC", tmp_path)
    for _ in range(3):
        with pytest.raises(trio.TooSlowError):
            await host.process_memory.usage(identity, 0.1)
    # Two threads wait, and the third caller has waited for one of them. They end now, and it goes on.
    with rollup.open("w"):
        await trio.sleep(0.1)
    monkeypatch.undo()
    assert (await host.process_memory.usage(identity, 10)).rss_kb > 0


def test_the_machine_is_measured(host: Host) -> None:
    figures = host.machine.figures()
    assert 0 <= figures.cpu_percent <= 100
    assert 0 < figures.memory_available_mb <= figures.memory_total_mb
    assert 0 <= host.machine.figures().cpu_percent <= 100
    assert host.clock.now().utcoffset() is not None
    assert host.random.new_id() != host.random.new_id()


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("some avg10=12.50 avg60=1.00 avg300=0.20 total=123\nfull avg10=3.00 avg60=0.10 avg300=0.00 total=5\n", 0.125),
        ("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_the_kernels_figure_of_memory_pressure_is_a_share(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, share: float
) -> None:
    file = tmp_path / "memory"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr("volant.host._machine._PRESSURE_FILE", file)
    assert host.machine.memory_pressure() == share


def test_this_hosts_memory_pressure_can_be_read(host: Host) -> None:
    assert 0.0 <= host.machine.memory_pressure() <= 1.0


@pytest.mark.parametrize(("share", "available_mb", "is_short"), [(0.2, 200, True), (0.2, 300, False), (0.1, 0, False)])
def test_programs_that_wait_while_memory_is_left_are_at_limits_of_their_own(
    host: Host, monkeypatch: pytest.MonkeyPatch, share: float, available_mb: int, is_short: bool
) -> None:
    monkeypatch.setattr(host.machine, "memory_pressure", lambda: share)
    monkeypatch.setattr(host.machine, "memory_available_mb", lambda: available_mb)
    monkeypatch.setattr(host.machine, "memory_total_mb", lambda: 1000)
    assert host.machine.is_short_of_memory() == is_short
