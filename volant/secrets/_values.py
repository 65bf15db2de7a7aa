"""The values that one VM gets, in plain text and only in memory."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class SecretValues(msgspec.Struct, frozen=True):
    """The values of a VM's secrets."""

    env: Mapping[str, bytes]
    """By environment variable."""
    files: Mapping[str, bytes]
    """By path in the guest."""

    def __repr__(self) -> str:
        return "SecretValues(…)"
