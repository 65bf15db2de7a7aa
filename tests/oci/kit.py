"""Layers and images for tests."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zstandard

from volant.oci import digest_of

needs_erofs = pytest.mark.skipif(
    shutil.which("mkfs.erofs") is None or shutil.which("fsck.erofs") is None, reason="erofs-utils is not installed"
)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root extracts devices and owners")
TIME = 1_700_000_000


def tar(*entries: tuple[str, dict[str, Any]]) -> bytes:
    """Returns a layer of files (`data`), links (`to`), hard links (`same_as`) and directories."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, members in entries:
            members = dict(members)
            info = tarfile.TarInfo(name)
            info.mtime = TIME
            data = members.pop("data", None)
            if (to := members.pop("to", None)) is not None:
                info.type, info.linkname = tarfile.SYMTYPE, to
            elif (same_as := members.pop("same_as", None)) is not None:
                info.type, info.linkname = tarfile.LNKTYPE, same_as
            elif data is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            else:
                info.size = len(data)
            for member, value in members.items():
                setattr(info, member, value)
            archive.addfile(info, io.BytesIO(data or b""))
    return buffer.getvalue()


def compress(layer: bytes, kind: str) -> bytes:
    """Compresses as the media type `tar`, `tar+gzip` or `tar+zstd` says."""
    return {
        "tar": lambda: layer,
        "tar+gzip": lambda: gzip.compress(layer, mtime=0),
        "tar+zstd": lambda: zstandard.compress(layer),
    }[kind]()


@dataclass
class BuiltImage:
    """An image in an OCI layout."""

    layout: Path
    digest: str
    diff_ids: list[str]
    blobs: list[str]


def write_layout(
    directory: Path,
    layers: Iterable[bytes],
    *,
    kind: str = "tar+gzip",
    index: list[dict[str, Any]] | None = None,
    last: tuple[Path, str] | None = None,
    **config: Any,
) -> BuiltImage:
    """Writes an image to an OCI layout, as `t`. `config` has Docker's members, such as `Cmd`.

    :param index: entries of an index that becomes `t` instead of the image
    :param last: one more layer, which may be large: its file, compressed, which is moved, and its diff ID
    """
    blobs = directory / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def put(data: bytes) -> dict[str, Any]:
        digest = digest_of(data)
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return {"digest": digest, "size": len(data)}

    plain = list(layers)
    diff_ids = [digest_of(layer) for layer in plain]
    if last is not None:
        diff_ids.append(last[1])
    document = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    described = [
        {"mediaType": f"application/vnd.oci.image.layer.v1.{kind}", **put(compress(layer, kind))} for layer in plain
    ]
    if last is not None:
        digest, size = f"sha256:{sha256(last[0])}", last[0].stat().st_size
        last[0].rename(blobs / digest.removeprefix("sha256:"))
        media_type = f"application/vnd.oci.image.layer.v1.{kind}"
        described.append({"mediaType": media_type, "digest": digest, "size": size})
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            **put(json.dumps({**document, "config": config}).encode()),
        },
        "layers": described,
    }
    found = {"mediaType": manifest["mediaType"], **put(json.dumps(manifest).encode())}
    top = found
    if index is not None:
        kind = "application/vnd.oci.image.index.v1+json"
        top = {
            "mediaType": kind,
            **put(json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": index}).encode()),
        }
    top = {**top, "annotations": {"org.opencontainers.image.ref.name": "t"}}
    (directory / "oci-layout").write_text('{"imageLayoutVersion":"1.0.0"}')
    (directory / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))
    return BuiltImage(directory, found["digest"], diff_ids, [each["digest"] for each in described])


def extract(file: Path, layers: Iterable[Path], target: Path) -> Path:
    """Extracts a file system by `fsck.erofs`, which checks all of it."""
    devices = [*layers, file.with_name("correcting.erofs")]
    command = ["fsck.erofs", *(f"--device={layer}" for layer in devices), f"--extract={target}", "--xattrs", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


@contextmanager
def small_disk(path: Path, *, size_mb: int) -> Iterator[Path]:
    """Mounts a file system of that size."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_mb}m", "small", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


def sha256(path: Path) -> str:
    """Returns the digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
