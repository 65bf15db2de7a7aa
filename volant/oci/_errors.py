"""The error of this package."""

from __future__ import annotations

from volant.model import CodedError


class OciError(CodedError):
    """An error of a reference, an image or one of its layers. The hint says what to do."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(code, message, hint)
