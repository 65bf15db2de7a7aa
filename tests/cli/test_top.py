"""`volar top` shows what VMs use now: the difference of two measurements."""

from __future__ import annotations

import json
import signal

import pytest

from tests.client.kit import answer, serving

from .kit import at_terminal, volar


def figures(name: str, clock_s: float, **more: object) -> dict[str, object]:
    """A measurement, as the API has it."""
    return {
        "name": name, "cpu_cores": 2, "memory_mb": 256, "clock_s": clock_s, "cpu_s": 0.0, "rss_mb": 80.0,
        "disk_read_bytes": 0, "disk_written_bytes": 0, "received_bytes": None, "sent_bytes": None, **more,
    }  # fmt: skip


BEFORE = [figures("idle", 10.0), figures("busy", 10.0, cpu_s=5.0, sent_bytes=0, received_bytes=2**20)]
AFTER = [
    figures("idle", 12.0),
    figures("busy", 12.0, cpu_s=8.0, disk_written_bytes=2**20, sent_bytes=4096, received_bytes=2**20),
    figures("new", 12.0, cpu_s=0.5),
]


async def test_the_busiest_is_first_and_rates_are_those_of_the_interval() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/stats/vms"] = [answer(BEFORE), answer(AFTER)]
        done = await volar(server, "top", "--once")
    title, busy, idle, new = done.out.decode().splitlines()
    assert title.split()[:3] == ["NAME", "CPU", "%"]
    assert busy.split() == [
        *("busy", "150.0", "80", "MiB", "256", "MiB"),
        *("0", "B", "512.0", "KiB", "0", "B", "2.0", "KiB"),
    ]
    assert idle.split() == ["idle", "0.0", "80", "MiB", "256", "MiB", "0", "B", "0", "B"]
    assert new.split() == ["new", "80", "MiB", "256", "MiB"]


@pytest.mark.parametrize(("words", "names"), [([], ["busy", "idle"]), (["idle"], ["idle"])])
async def test_programs_get_the_totals_and_names(words: list[str], names: list[str]) -> None:
    async with serving() as server:
        server.routes["GET /api/v1/stats/vms"] = answer(BEFORE)
        document = await volar(server, "top", "--json", *words)
        listed = await volar(server, "top", "-q", *words)
    assert json.loads(document.out) == [each for each in BEFORE if each["name"] in names]
    assert listed.out.decode().split() == names


async def test_a_terminal_is_redrawn_until_the_user_interrupts() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/stats/vms"] = [answer(BEFORE), answer(AFTER), answer(AFTER), *[answer(AFTER)] * 600]
        async with at_terminal(server.base_url, "top", "-d", "100ms") as at:
            for _ in range(3):
                await at.expect(rb"\x1b\[H\x1b\[J")
            at.process.send_signal(signal.SIGINT)
            assert await at.end() == 0
    assert b"busy" in at.seen
    assert b"Traceback" not in at.seen
