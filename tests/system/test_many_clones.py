"""Many clones created at once all run, each with its own identity."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import trio

from tests.system.clones import Who, who
from tests.system.kit import BOOT_S, Daemon, Stopwatch, boot, load, run, spec
from volant.model import VmView

CLONES = load("VOLANT_TEST_CLONES", usual=8, full=50)
CLOCK_S = 0.05


@pytest.mark.full
@pytest.mark.alone
async def test_clones_created_at_once_have_an_identity_each(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--templates", "auto")
    made: dict[str, VmView] = {}
    found: dict[str, Who] = {}
    async with daemon.client() as client:
        await boot(client, "first", boot="template")
        watch = Stopwatch()

        async def one(name: str) -> None:
            waited = await client.vms.create_and_wait(spec(name), timeout_s=BOOT_S)
            assert waited.outcome == "met", waited
            assert waited.vm is not None
            made[name] = waited.vm

        async with trio.open_nursery() as nursery:
            for number in range(CLONES):
                nursery.start_soon(one, f"clone{number}")
        print(f"{CLONES} clones ran after {watch.seconds:.1f} s")
        for name, vm in made.items():
            assert (vm.booted_from, vm.fallback) == ("template", None), vm
            found[name] = await who(client, name)
        # A write in one is not visible in others, and none waits for another.
        await run(client, "clone0", "touch", "/root/mine")
        for name in found:
            assert ("mine" in await run(client, name, "ls", "-a", "/root")) == (name == "clone0"), name
        # Allow for the error of the measurement. On a busy host the clock is set again later.
        with trio.fail_after(BOOT_S):
            while off := {name: each for name, each in found.items() if not is_right(each)}:
                found |= {name: await who(client, name) for name in off}

    assert {name: each.hostname for name, each in found.items()} == {name: name for name in made}
    assert {name: each.clone["vm_id"] for name, each in found.items()} == {name: vm.id for name, vm in made.items()}
    for what in ("random_uuid", "urandom", "boot_id", "machine_id"):
        assert len({getattr(each, what) for each in found.values()}) == CLONES, what
    assert len({each.clone["instance_id"] for each in found.values()}) == CLONES
    # Only network interfaces with addresses.
    for addresses in ([vm.mac_address for vm in made.values()], [vm.ip_address for vm in made.values()]):
        given = [address for address in addresses if address]
        assert len(set(given)) == len(given)


def is_right(each: Who) -> bool:
    """Returns whether its clock is right."""
    return abs(each.clock_off_s) - each.clock_way_s / 2 <= CLOCK_S
