"""How far a fetch is, for those who watch it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import trio

from volant.model import DEFAULT_PROJECT

_PROGRESS_STEPS = 20
"""A fetch reports its progress each time another twentieth has arrived, so at most 19 times."""
_RATE_SAMPLES = 10
"""Of half a second each: what `bytes_per_s` is the mean of."""

Phase = Literal["waiting", "resolving", "fetching", "converting"]


Kind = Literal["started", "progress", "done", "failed"]


class PullEvent(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to a fetch that brings layers."""

    kind: Kind
    project: str = DEFAULT_PROJECT
    """Whose request began the fetch."""
    reference: str
    digest: str
    done_bytes: int = 0
    total_bytes: int = 0
    layers_done: int = 0
    layers_total: int = 0
    bytes_per_s: float = 0.0
    code: str = ""
    """Of the error."""
    message: str = ""
    """Of the error; without credentials."""


Observe = Callable[[PullEvent], None]
"""Takes events. Must not block, and not raise."""


class Report(msgspec.Struct, kw_only=True):
    """How far a fetch is. All waiters of one image have the same one."""

    phase: Phase = "waiting"
    done_bytes: int = 0
    total_bytes: int = 0
    """Of the layers that the cache lacks, as they are fetched; 0: not known."""
    converted: Sequence[Path] = ()
    """The files that layers become, once they are whole."""
    layers_total: int = 0
    """Those that the cache lacks; 0: not known."""
    is_done: bool = False
    on_step: Callable[[], None] = lambda: None
    """Called when another twentieth has arrived."""
    _samples: deque[tuple[float, int]] = msgspec.field(default_factory=lambda: deque(maxlen=_RATE_SAMPLES))
    _step: int = 0

    def begin(self, total_bytes: int, layers: int) -> None:
        """Notes how much is to come."""
        self.total_bytes, self.layers_total = total_bytes, layers

    def finish(self) -> None:
        """Notes that everything is in the cache."""
        self.is_done, self.done_bytes = True, self.total_bytes

    def count(self, done_bytes: int) -> None:
        """Notes how much has arrived."""
        self.done_bytes = min(done_bytes, self.total_bytes) if self.total_bytes else done_bytes
        self._samples.append((trio.current_time(), self.done_bytes))
        step = _PROGRESS_STEPS * self.done_bytes // self.total_bytes if self.total_bytes else 0
        if self._step < step < _PROGRESS_STEPS:
            self._step = step
            self.on_step()

    @property
    def layers_done(self) -> int:
        """Fetched and converted."""
        return self.layers_total if self.is_done else sum(path.exists() for path in self.converted)

    @property
    def bytes_per_s(self) -> float:
        """During the last seconds; 0 when nothing is being fetched."""
        if self.phase != "fetching" or len(self._samples) < 2:
            return 0.0
        (since, before), (until, after) = self._samples[0], self._samples[-1]
        return max(0, after - before) / (until - since) if until > since else 0.0
