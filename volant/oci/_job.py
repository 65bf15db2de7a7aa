"""What the process that converts layers is given, and how its end is read."""

from __future__ import annotations

from pathlib import Path

import msgspec

from ._errors import OciError
from ._layers import LayerJob, convert, join


class ImageJob(msgspec.Struct, frozen=True):
    """The layers of an image that the cache lacks, and the join of all."""

    convert: tuple[LayerJob, ...]
    layers: tuple[str, ...]
    """Paths of the files of all layers, lowest first."""
    metadata: str
    """Path of the file that joins them."""


class Failure(msgspec.Struct, frozen=True):
    """Why a job failed, as an `OciError`."""

    code: str
    message: str
    hint: str


def run(job: ImageJob) -> None:
    """Does a job. :raises OciError: as `convert` :raises OSError: the disk fails"""
    for layer in job.convert:
        convert(layer)
    join(job.layers, Path(job.metadata))


def check_end(status: int, output: bytes) -> None:
    """Reads how the process ended. :raises OciError:"""
    last = output.strip().rpartition(b"\n")[2]
    if status == 0 and last == b"{}":
        return
    try:
        failure = msgspec.json.decode(last, type=Failure)
    except msgspec.MsgspecError:
        said = last.decode(errors="replace")[:300] or f"status {status}"
        raise OciError("io_error", f"the process that converts layers died: {said}", "check memory and disk") from None
    raise OciError(failure.code, failure.message, failure.hint)
