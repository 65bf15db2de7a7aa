"""The progress of a fetch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import trio

from volant.model import DEFAULT_PROJECT

_PROGRESS_STEPS = 20
"""The number of steps of a fetch. It reports its progress after each step but the last, so at most 19 times."""
_RATE_SAMPLES = 10
"""The number of samples, of half a second each, in the mean `bytes_per_s`."""

Phase = Literal["waiting", "resolving", "fetching", "converting"]


Kind = Literal["started", "progress", "done", "failed"]


class PullEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a fetch that brings layers."""

    kind: Kind
    project: str = DEFAULT_PROJECT
    """The project of the request that began the fetch."""
    reference: str
    digest: str
    done_bytes: int = 0
    total_bytes: int = 0
    layers_done: int = 0
    layers_total: int = 0
    bytes_per_s: float = 0.0
    code: str = ""
    """The error code."""
    message: str = ""
    """The error message, without credentials."""


Observe = Callable[[PullEvent], None]
"""A callback for events. Must not block, and not raise."""


class Report(msgspec.Struct, kw_only=True):
    """The progress of a fetch, shared by all waiters of one image."""

    phase: Phase = "waiting"
    done_bytes: int = 0
    total_bytes: int = 0
    """The size of the layers that the cache lacks, as fetched; 0 if not known yet."""
    converted: Sequence[Path] = ()
    """The files of converted layers, which exist once they are complete."""
    layers_total: int = 0
    """The number of layers that the cache lacks; 0 if not known yet."""
    is_done: bool = False
    on_step: Callable[[], None] = lambda: None
    """A callback after each step of a twentieth."""
    _samples: deque[tuple[float, int]] = msgspec.field(default_factory=lambda: deque(maxlen=_RATE_SAMPLES))
    _step: int = 0

    def begin(self, total_bytes: int, layers: int) -> None:
        """Records the amount to fetch."""
        self.total_bytes, self.layers_total = total_bytes, layers

    def finish(self) -> None:
        """Records that everything is in the cache."""
        self.is_done, self.done_bytes = True, self.total_bytes

    def count(self, done_bytes: int) -> None:
        """Records the amount that has arrived."""
        self.done_bytes = min(done_bytes, self.total_bytes) if self.total_bytes else done_bytes
        self._samples.append((trio.current_time(), self.done_bytes))
        step = _PROGRESS_STEPS * self.done_bytes // self.total_bytes if self.total_bytes else 0
        if self._step < step < _PROGRESS_STEPS:
            self._step = step
            self.on_step()

    @property
    def layers_done(self) -> int:
        """The number of layers fetched and converted."""
        return self.layers_total if self.is_done else sum(path.exists() for path in self.converted)

    @property
    def bytes_per_s(self) -> float:
        """The rate during the last seconds; 0 if nothing is being fetched."""
        if self.phase != "fetching" or len(self._samples) < 2:
            return 0.0
        (since, before), (until, after) = self._samples[0], self._samples[-1]
        return max(0, after - before) / (until - since) if until > since else 0.0
