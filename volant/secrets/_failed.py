"""The failure to have the value of a secret."""

from __future__ import annotations

from volant.model import CodedError


class SecretFailed(CodedError):
    """The value of a secret can't be had. `code`: `secret_missing`, `secret_unreadable`, or `secret_unusable`."""
