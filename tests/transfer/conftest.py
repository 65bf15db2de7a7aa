"""A registry for each file of tests, and a proxy before it for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.oci.registry import Registry
from tests.transfer.kit import Proxy


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry") / "r", authenticates=False) as running:
        yield running


@pytest.fixture
def proxy(registry: Registry) -> Iterator[Proxy]:
    with Proxy(registry.address) as running:
        yield running
