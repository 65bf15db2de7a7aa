"""The facet for random numbers."""

from __future__ import annotations

import os
import uuid
from typing import Protocol


class Random(Protocol):
    def new_id(self) -> str:
        """Returns 32 hexadecimal digits that were never returned before."""

    def token_bytes(self, size: int) -> bytes:
        """Returns `size` random bytes, good enough for keys."""


class LinuxRandom(Random):
    def new_id(self) -> str:
        return uuid.uuid4().hex

    def token_bytes(self, size: int) -> bytes:
        return os.urandom(size)
