"""Uploads a file in pieces, such as an artifact or an image, and reads the short answer."""

from __future__ import annotations

from collections.abc import AsyncIterable, Mapping
from typing import NamedTuple, TypeVar

from volant.model import ArtifactView, ImageView

from ._actions import Pieces
from ._calls import part
from ._errors import UnexpectedAnswer
from ._http import Http, chunks_of
from ._transport import Request, decode_json

UPLOAD_S = 1800.0
"""How long the daemon may take to read and verify a file, the same as its `artifact_timeout_s`."""
_CONVERTED_S = 1800.0
"""How long the daemon may take to convert an image, the same as its `oci_timeout_s`."""
_SILENCE_S = 120.0
"""Maximum wait without progress. The daemon writes the end of a large file to the disk before it answers."""


async def send_artifact(http: Http, sha256: str, content: AsyncIterable[bytes], size: int) -> ArtifactView:
    """Uploads a file of `size` bytes."""
    sent = Sent(content, size, "application/octet-stream", _SILENCE_S)
    return await send(http, "PUT", f"/api/v1/artifacts/{part(sha256, 'sha256')}", sent, ArtifactView)


async def send_image(http: Http, content: AsyncIterable[bytes], size: int, reference: str) -> ImageView:
    """Uploads an OCI image as an archive of `size` bytes."""
    sent = Sent(content, size, "application/octet-stream", _CONVERTED_S, {"reference": reference})
    return await send(http, "PUT", "/api/v1/images/archive", sent, ImageView)


T = TypeVar("T")

_MAX_ANSWER = 1024 * 1024


class Sent(NamedTuple):
    """The body of an upload, and its parameters."""

    content: AsyncIterable[bytes]
    size: int
    """Its length in bytes."""
    media_type: str
    read_s: float
    """How long the daemon may take to answer after the last byte, in seconds."""
    query: Mapping[str, str | None] = {}


async def send(http: Http, method: str, path: str, sent: Sent, kind: type[T]) -> T:
    """Uploads a file and returns the answer, decoded as `kind`.

    :raises ClientError: the daemon refuses it, can't be reached, or its answer is malformed
    """
    body = bytearray()
    headers = {"Content-Type": sent.media_type, "Content-Length": str(sent.size)}
    request = Request(method, path, sent.query, headers=headers)
    async with http.stream(request, read_s=sent.read_s, content=Pieces(sent.content)) as response:
        async with chunks_of(response) as chunks:
            async for piece in chunks:
                body += piece
                if len(body) > _MAX_ANSWER:
                    raise UnexpectedAnswer(f"the answer to {method} {path} is too long")
    return decode_json(bytes(body), kind, f"the answer to {method} {path}")
