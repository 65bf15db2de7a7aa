"""The example of deterministic clocks passes, and the summary shows the figures of its system."""

from __future__ import annotations

from .kit import run_module


def test_the_example_passes() -> None:
    ran = run_module("pytest", "-p", "actors.testing.plugin", "-p", "no:cacheprovider", "examples/test_clocks")
    assert ran.returncode == 0, ran.stdout
    assert "25 runs, 93,000 virtual seconds" in ran.stdout
