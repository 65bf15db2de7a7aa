"""Files as chunks that are addressed by their content, for transfers between hosts and registries.

`docs/explanation/snapshots.md` has the design. This package knows no VM, no snapshot and no registry: it describes
files, and moves the chunks that the other end lacks.
"""

from ._description import (
    MAX_CHUNK_BYTES,
    MAX_PIECES,
    ZEROS,
    ChunkedFile,
    ChunkError,
    Description,
    Place,
    check,
    chunk_bytes_for,
)
from ._files import Assembly, ChunkReader, LocalChunks, check_chunk, open_files
from ._transfer import Progress, Received, Sink, Source, Throttle, receive, send

__all__ = [
    "MAX_CHUNK_BYTES",
    "MAX_PIECES",
    "ZEROS",
    "Assembly",
    "ChunkError",
    "ChunkReader",
    "ChunkedFile",
    "Description",
    "LocalChunks",
    "Place",
    "Progress",
    "Received",
    "Sink",
    "Source",
    "Throttle",
    "check",
    "check_chunk",
    "chunk_bytes_for",
    "open_files",
    "receive",
    "send",
]
