"""The failure of a step."""

from __future__ import annotations


class StepError(Exception):
    """A step of a VM failed. `code` becomes the reason's code, the text its message."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
