"""The simulated registry and cache keep the promises of the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.simulated import World
from tests.simulation.kit import run_story
from volant.oci import OciError

pytestmark = pytest.mark.simulation


async def fetch(world: World) -> str:
    found = await world.daemon.oci.resolve("app", "default")
    return (await world.daemon.oci.obtain_digest(found.digest, found.reference, "default")).digest


def test_an_image_is_fetched_once_and_survives_a_restart_of_the_host(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        registry = world.machine.registry
        with pytest.raises(OciError, match="manifest unknown"):
            await fetch(world)
        digest = registry.push("app")
        assert await fetch(world) == digest
        await world.power_cut()
        await world.start_daemon()
        assert await fetch(world) == digest
        assert registry.pulls == 1

    run_story(tmp_path, story, seed=1)


def test_a_daemon_that_is_killed_in_a_fetch_leaves_no_image(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        registry = world.machine.registry
        registry.push("app")

        async def ask() -> None:
            with pytest.raises(BaseException):  # noqa: B017, PT011 - whatever the death of a daemon raises
                await fetch(world)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(3)
            await world.kill_daemon()
        assert registry.pulls == 1
        await world.start_daemon()
        assert (await world.daemon.oci.resolve("app", "default")).total_bytes > 0
        await fetch(world)
        assert registry.pulls == 2

    run_story(tmp_path, story, seed=2)


@pytest.mark.parametrize(
    ("fault", "code"), [("oci__fails", "fetch_interrupted"), ("oci__wrong_digest", "image_mismatch")]
)
def test_a_fetch_fails_with_a_code(tmp_path: Path, fault: str, code: str) -> None:
    async def story(world: World) -> None:
        world.machine.registry.push("app")
        with pytest.raises(OciError) as caught:
            await fetch(world)
        assert caught.value.code == code
        assert (await world.daemon.oci.resolve("app", "default")).total_bytes > 0

    run_story(tmp_path, story, seed=3, **{fault: 1.0})
