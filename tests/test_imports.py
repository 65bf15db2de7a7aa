"""The packages that others install without the daemon use only the libraries that they declare."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
OURS = {"actors", "volant"}
MAY_USE = {
    "actors": {"trio", "pytest"},
    "volant/model": {"msgspec"},
    "volant/client": {"h11", "httpx", "msgspec", "trio", "trio_websocket"},
    "volant/guest": {"h11", "h2", "hyperframe", "wsproto"},
}
"""Third-party libraries by package. `actors.testing` brings a pytest plugin."""


@pytest.mark.parametrize("package", MAY_USE)
def test_a_package_imports_only_its_libraries(package: str) -> None:
    used = {name for file in (REPOSITORY / package).rglob("*.py") for name in imported(file)}
    assert used - sys.stdlib_module_names - OURS <= MAY_USE[package]


def imported(file: Path) -> Iterator[str]:
    """Yields the top-level names that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("package", ["volant.client", "volant.daemon", "volant.images", "volant.oci"])
def test_everything_that_a_package_exports_late_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []
