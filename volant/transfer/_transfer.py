"""The state of one transfer, which clients can watch."""

from __future__ import annotations

from typing import Literal

import msgspec

from volant.chunks import Progress
from volant.model import CodedError, TransferView


class TransferError(CodedError):
    """An error of sending, receiving or using a snapshot.

    `snapshot_unsupported`, `snapshot_invalid`, `snapshot_too_large`, `snapshot_unfit`, `snapshot_elsewhere`,
    `base_missing`, `base_mismatch`, `snapshot_damaged`, `disk_full`, `transfer_failed`, `transfer_timeout`,
    `too_many_transfers`.
    """


class Transfer(msgspec.Struct, eq=False):
    """A running or waiting transfer."""

    kind: Literal["push", "pull"]
    project: str
    snapshot: str
    reference: str
    """The source or the target."""
    phase: Literal["waiting", "preparing", "moving", "finishing"] = "waiting"
    progress: Progress = msgspec.field(default_factory=Progress)

    def view(self) -> TransferView:
        """Returns the view of the transfer."""
        progress = self.progress
        return TransferView(
            kind=self.kind,
            project=self.project,
            snapshot=self.snapshot,
            reference=self.reference,
            phase=self.phase,
            done_bytes=progress.done_bytes,
            total_bytes=progress.total_bytes,
            moved_bytes=progress.moved_bytes,
            done_chunks=progress.done_chunks,
            total_chunks=progress.total_chunks,
            moved_chunks=progress.moved_chunks,
        )
