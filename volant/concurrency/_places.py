"""Places of which no project can take all, for work that is refused instead of queued."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class NoPlace(Exception):
    """All places are taken. The text names their number and their owner."""


class Places:
    """A number of places, shared by projects."""

    def __init__(self, total: int, each: int) -> None:
        """
        :param total: places of all projects together
        :param each: places of one project
        """
        self._total = total
        self._each = each
        self._taken: Counter[str] = Counter()

    @contextmanager
    def take(self, project: str) -> Iterator[None]:
        """Takes a place for the length of a block. :raises NoPlace:"""
        if self._taken[project] >= self._each:
            raise NoPlace(f"{self._each} of project {project!r}")
        if self._taken.total() >= self._total:
            raise NoPlace(f"{self._total} of all projects")
        self._taken[project] += 1
        try:
            yield
        finally:
            self._taken[project] -= 1
            if not self._taken[project]:
                del self._taken[project]
