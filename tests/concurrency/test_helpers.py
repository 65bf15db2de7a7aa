"""Background tasks end with their block, and an exception of the block is in no group."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from volant.concurrency import open_helpers


async def test_helpers_end_with_the_block(autojump_clock: trio.testing.MockClock) -> None:
    ended = trio.Event()

    async def help_for_ever() -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.set()

    async with open_helpers() as helpers:
        helpers.start_soon(help_for_ever)
        await trio.sleep(1)
        assert not ended.is_set()
    assert ended.is_set()


async def test_an_exception_of_the_block_is_in_no_group() -> None:
    async def block() -> None:
        async with open_helpers() as helpers:
            helpers.start_soon(trio.sleep_forever)
            raise KeyError

    with pytest.raises(KeyError):
        await block()


async def test_an_exception_of_a_helper_cancels_the_block() -> None:
    async def fail() -> None:
        raise KeyError

    with trio.fail_after(5), pytest.RaisesGroup(KeyError):
        async with open_helpers() as helpers:
            helpers.start_soon(fail)
            await trio.sleep_forever()


async def test_a_block_that_is_cancelled_from_outside_raises_nothing_else() -> None:
    with trio.move_on_after(0.01) as scope:
        async with open_helpers() as helpers:
            helpers.start_soon(trio.sleep_forever)
            await trio.sleep_forever()
    assert scope.cancelled_caught
