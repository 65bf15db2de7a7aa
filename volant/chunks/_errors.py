"""The error of this package."""

from __future__ import annotations

from volant.model import CodedError


class ChunkError(CodedError):
    """Files can't be described, sent or assembled: `description_invalid`, `chunk_mismatch`, `too_large`."""
