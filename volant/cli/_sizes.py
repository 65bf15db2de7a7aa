"""Sizes of memory and disks as people write them: `1G`, `512M`, or a plain number of MiB."""

from __future__ import annotations

import re
from typing import Any

import click

_SIZE = r"(\d{1,12})(?:\.(\d{1,3}))?\s?(?:([kmgt])i?b?|(b)?)\Z"
_UNITS = {"b": 1, "k": 2**10, "": 2**20, "m": 2**20, "g": 2**30, "t": 2**40}


class Size(click.ParamType[int]):
    """A size, as MiB. Units are powers of 1024, as Docker's; a part of a MiB counts as a whole one.

    :param minimum: the least that is allowed, in MiB
    """

    name = "size"

    def __init__(self, minimum: int = 1) -> None:
        self._minimum = minimum

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if (found := re.match(_SIZE, str(value).strip(), re.IGNORECASE | re.ASCII)) is None:
            self.fail(f"{value!r} is no size; write it like 512M, 1.5G or 10G", param, ctx)
        whole, part, unit = found[1], found[2] or "", (found[3] or found[4] or "").lower()
        size_mb: int = -(-int(whole + part) * _UNITS[unit] // (10 ** len(part) * 2**20))
        if size_mb < self._minimum:
            self.fail(f"{value!r} is less than {self._minimum}M", param, ctx)
        return size_mb
