"""Several VMs created at once all run."""

from __future__ import annotations

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, Stopwatch, load, run, spec

ROUNDS = load("VOLANT_TEST_ROUNDS", usual=2, full=10)


@pytest.mark.full
@pytest.mark.alone
@pytest.mark.parametrize("round_", range(ROUNDS))
async def test_four_vms_created_at_once_all_run(daemon: Daemon, round_: int) -> None:
    answers: dict[str, str] = {}
    watch = Stopwatch()
    async with daemon.client() as client:

        async def one(name: str) -> None:
            waited = await client.vms.create_and_wait(spec(name), timeout_s=2 * BOOT_S)
            assert waited.outcome == "met", waited
            answers[name] = await run(client, name, "hostname")

        async with trio.open_nursery() as nursery:
            for i in range(4):
                nursery.start_soon(one, f"vm{i}")
        print(f"four VMs ran after {watch.seconds:.1f} s")
        assert answers == {f"vm{i}": f"vm{i}\n" for i in range(4)}
        assert len(daemon.hypervisors()) == 4
        async with trio.open_nursery() as nursery:
            for name in answers:
                nursery.start_soon(client.vms.delete, name)
    assert daemon.hypervisors() == {}
    assert daemon.files() == []
