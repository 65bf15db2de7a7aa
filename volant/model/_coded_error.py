"""The base of errors that say what happened and what to do about it."""

from __future__ import annotations


class CodedError(Exception):
    """Something failed.

    `code` is for programs, `message` says what happened, `hint` what to do about it.
    """

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message
