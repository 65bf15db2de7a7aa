"""The checks of `volantd check`."""

from ._examine import check as check
