"""Clients in JavaScript that this project did not write: installed once from their lock, and run by its Node."""

from __future__ import annotations

import pytest

from tests.conformance.kit import Node, installed_node


@pytest.fixture(scope="session")
def node() -> Node:
    """Runs scripts of `tests/conformance/js`, which import the packages of its `package.json`."""
    return installed_node()
