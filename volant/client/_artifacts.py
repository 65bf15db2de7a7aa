"""Files that VMs boot from, on their way to the daemon."""

from __future__ import annotations

from collections.abc import AsyncIterable

from volant.model import ArtifactView

from ._actions import Pieces
from ._errors import UnexpectedAnswer
from ._http import Http, chunks_of, decode_json

UPLOAD_S = 1800.0
"""How long the daemon may take to read and verify a file, in seconds: its own `media_timeout_s`."""
_SILENCE_S = 120.0
_MAX_ANSWER = 1024 * 1024


async def send_artifact(http: Http, sha256: str, content: AsyncIterable[bytes], size: int) -> ArtifactView:
    """Send a file of `size` bytes."""
    body = bytearray()
    async with http.stream(
        "PUT",
        f"/api/v1/artifacts/{sha256}",
        content=Pieces(content),
        headers={"Content-Type": "application/octet-stream", "Content-Length": str(size)},
        # The daemon writes the end of a large file to the disk before it answers.
        read_s=_SILENCE_S,
    ) as response:
        async with chunks_of(response) as chunks:
            async for piece in chunks:
                body += piece
                if len(body) > _MAX_ANSWER:
                    raise UnexpectedAnswer("the answer to an upload is too long")
    return decode_json(bytes(body), ArtifactView, "the answer to the upload")
