"""Writes an OCI archive: a tar with an image of one layer, as `docker load` and `skopeo` take it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from datetime import UTC, datetime
from pathlib import Path

_MEDIA = "application/vnd.oci.image"


def write_archive(target: Path, layer: Path, config: dict[str, object], name: str, created: int) -> str:
    """Writes an archive with a layer, which is an uncompressed tar; returns the digest of the image.

    :param config: the `config` of the image's configuration
    :param name: the reference that the archive suggests
    :param created: seconds since 1970
    :raises OSError: the disk fails
    """
    with layer.open("rb") as handle:
        layer_digest = hashlib.file_digest(handle, "sha256").hexdigest()
    configuration = _json(
        {
            "architecture": "amd64",
            "os": "linux",
            "created": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
        }
    )
    layers = [_descriptor(f"{_MEDIA}.layer.v1.tar", layer_digest, layer.stat().st_size)]
    manifest = _json(
        {
            "schemaVersion": 2,
            "mediaType": f"{_MEDIA}.manifest.v1+json",
            "config": _descriptor(f"{_MEDIA}.config.v1+json", _digest(configuration), len(configuration)),
            "layers": layers,
        }
    )
    entry = _descriptor(f"{_MEDIA}.manifest.v1+json", _digest(manifest), len(manifest))
    entry["annotations"] = {"org.opencontainers.image.ref.name": name}
    index = _json({"schemaVersion": 2, "manifests": [entry]})
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as out:
        _add(out, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _add(out, "index.json", index)
        for data in (manifest, configuration):
            _add(out, f"blobs/sha256/{_digest(data)}", data)
        info = tarfile.TarInfo(f"blobs/sha256/{layer_digest}")
        info.size = layer.stat().st_size
        with layer.open("rb") as handle:
            out.addfile(info, handle)
    return f"sha256:{_digest(manifest)}"


def _add(out: tarfile.TarFile, path: str, data: bytes) -> None:
    info = tarfile.TarInfo(path)
    info.size = len(data)
    out.addfile(info, io.BytesIO(data))


def _descriptor(media_type: str, digest: str, size: int) -> dict[str, object]:
    return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": size}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True).encode()
