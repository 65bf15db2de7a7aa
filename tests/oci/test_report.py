"""How far a fetch is: bytes, layers and rate, each twentieth of it reported once."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from volant.oci._report import Report


async def test_each_twentieth_is_reported_with_layers_and_rate(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    layers = [tmp_path / "one", tmp_path / "two"]
    steps: list[tuple[int, int, float]] = []
    report = Report(converted=layers, phase="fetching")
    report.on_step = lambda: steps.append((report.done_bytes, report.layers_done, report.bytes_per_s))
    report.begin(2000, len(layers))
    for done in range(0, 2100, 50):
        report.count(done)
        await trio.sleep(0.5)
        if done == 1000:
            layers[0].touch()
    assert len(steps) == 19
    assert steps[0] == (100, 0, 100.0)
    assert steps[-1] == (1900, 1, 100.0)
    report.finish()
    assert report.layers_done == report.layers_total == 2


async def test_nothing_has_a_rate_before_it_moves(autojump_clock: trio.testing.MockClock) -> None:
    report = Report(phase="fetching")
    report.count(10)
    assert report.bytes_per_s == 0
