"""The error of this package."""

from __future__ import annotations

from volant.model import CodedError


class TransferError(CodedError):
    """A snapshot can't be sent, received or used here.

    `snapshot_unsupported`, `snapshot_invalid`, `snapshot_too_large`, `snapshot_unfit`, `snapshot_elsewhere`,
    `base_missing`, `base_mismatch`, `snapshot_damaged`, `disk_full`, `transfer_failed`, `transfer_timeout`,
    `too_many_transfers`.
    """
