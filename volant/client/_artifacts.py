"""Sends files that VMs boot from: artifacts and images."""

from __future__ import annotations

from collections.abc import AsyncIterable

from volant.model import ArtifactView, ImageView

from ._calls import part
from ._http import Http
from ._upload import Sent, send

UPLOAD_S = 1800.0
"""How long the daemon may take to read and verify a file, in seconds: its own `artifact_timeout_s`."""
_CONVERTED_S = 1800.0
"""How long the daemon may take to convert an image: its own `oci_timeout_s`."""
_SILENCE_S = 120.0
"""The daemon writes the end of a large file to the disk before it answers."""


async def send_artifact(http: Http, sha256: str, content: AsyncIterable[bytes], size: int) -> ArtifactView:
    """Sends a file of `size` bytes."""
    sent = Sent(content, size, "application/octet-stream", _SILENCE_S)
    return await send(http, "PUT", f"/api/v1/artifacts/{part(sha256, 'sha256')}", sent, ArtifactView)


async def send_image(http: Http, content: AsyncIterable[bytes], size: int, reference: str) -> ImageView:
    """Sends an OCI image as an archive of `size` bytes."""
    sent = Sent(content, size, "application/octet-stream", _CONVERTED_S, {"reference": reference})
    return await send(http, "PUT", "/api/v1/images/archive", sent, ImageView)
