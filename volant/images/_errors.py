"""The error of this package."""

from __future__ import annotations

from volant.model import CodedError


class ImageError(CodedError):
    """An image or artifact could not be built, fetched or used."""
