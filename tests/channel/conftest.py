"""Runs the tests of streams on each transport into a guest."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from volant.channel import Channel, open_channel

from .kit import WAYS, Agent, Port, Way


@pytest.fixture(params=WAYS)
async def way(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Way]:
    async with WAYS[request.param](tmp_path / "agent.sock").open() as way:
        yield way


@pytest.fixture
async def port(tmp_path: Path) -> AsyncIterator[Port]:
    async with Port(tmp_path / "agent.sock").open() as port:
        yield port


@pytest.fixture
async def channel(way: Way, guest: Agent) -> AsyncIterator[Channel]:
    """A channel to the agent that the module's fixture `guest` begins."""
    async with open_channel(way.host, way.address) as channel:
        yield channel
