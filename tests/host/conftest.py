"""Fixtures of the tests of volant/host, which run on the real machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from volant.host import Host, ProcessGone
from volant.model import ProcessIdentity


@pytest.fixture
def host() -> Host:
    return Host()


@pytest.fixture
def tag(host: Host) -> str:
    return f"volant-test.{host.random.new_id()}"


@pytest.fixture
def started(host: Host) -> Iterator[list[ProcessIdentity]]:
    identities: list[ProcessIdentity] = []
    yield identities
    for identity in identities:
        try:
            with host.processes.open(identity) as process:
                process.kill()
        except ProcessGone:
            pass
