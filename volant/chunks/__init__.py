"""Files as chunks that are addressed by their content, for transfers between hosts and registries.

`docs/explanation/snapshots.md` has the design. This package is independent of VMs, snapshots and registries: it
describes files, and moves the chunks that the other end lacks.
"""

from ._description import (
    MAX_CHUNK_BYTES as MAX_CHUNK_BYTES,
    MAX_PIECES as MAX_PIECES,
    ZEROS as ZEROS,
    ChunkedFile as ChunkedFile,
    ChunkError as ChunkError,
    Description as Description,
    Place as Place,
    check as check,
    chunk_bytes_for as chunk_bytes_for,
)
from ._files import (
    Assembly as Assembly,
    ChunkReader as ChunkReader,
    LocalChunks as LocalChunks,
    check_chunk as check_chunk,
    open_files as open_files,
)
from ._transfer import (
    Progress as Progress,
    Received as Received,
    Sink as Sink,
    Source as Source,
    Throttle as Throttle,
    receive as receive,
    send as send,
)
