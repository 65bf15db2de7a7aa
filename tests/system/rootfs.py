"""Makes small root filesystems without root and without mounts."""

from __future__ import annotations

import hashlib
import io
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.oci.kit import tar
from volant.model import Artifact, Boot, Manifest

APPLETS = ("cat", "dd", "echo", "env", "grep", "httpd", "id", "ls", "mkdir", "mount", "pwd", "rm", "sleep", "sync")
"""Without a shell: the agent must not need one."""


def busybox(cache: Path) -> bytes:
    """Returns BusyBox, linked statically, from the packages of the boot image."""
    (deb,) = (cache / "packages/archives").glob("busybox-static_*.deb")
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    files = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    with tarfile.open(fileobj=io.BytesIO(files)) as archive:
        program = archive.extractfile("./usr/bin/busybox")
        assert program is not None
        return program.read()


def busybox_layer(cache: Path, *entries: tuple[str, dict[str, Any]]) -> bytes:
    """Returns the layer of an OCI image with BusyBox and what `tests.oci.kit.tar` makes of `entries`."""
    names = ("sh", "echo", "cat", "id", "sleep", "stat", "ls", "rm", "df", "sync", "sha256sum", "tail")
    links = [(f"bin/{name}", {"to": "busybox"}) for name in names]
    return tar(("bin", {}), ("bin/busybox", {"data": busybox(cache), "mode": 0o755}), *links, *entries)


def make_ext4(path: Path, cache: Path, *, files: Mapping[str, str] = {}, size_mb: int = 24) -> Path:
    """Writes an ext4 image to `path`, with BusyBox and `files` by their paths."""
    with TemporaryDirectory() as scratch:
        tree = Path(scratch)
        (tree / "bin").mkdir()
        program = tree / "bin/busybox"
        program.write_bytes(busybox(cache))
        program.chmod(0o755)
        for name in APPLETS:
            (tree / "bin" / name).symlink_to("busybox")
        for name, text in files.items():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(text)
        options = ["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d", str(tree)]
        subprocess.run(["mke2fs", *options, str(path), f"{size_mb}M"], check=True, timeout=60)
    return path


def digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def plugin(name: str, rootfs: Path | Artifact, **fields: Any) -> Manifest:
    """Returns a plugin with a root filesystem."""
    artifact = rootfs if isinstance(rootfs, Artifact) else Artifact(str(rootfs), digest(rootfs))
    return Manifest(name=name, boot=Boot(rootfs=artifact), **fields)


def is_clean(layer: Path) -> bool:
    """Returns whether the filesystem in a layer was unmounted cleanly: its journal has nothing to recover."""
    with TemporaryDirectory() as scratch:
        raw = Path(scratch) / "raw"
        subprocess.run(["qemu-img", "convert", "-O", "raw", str(layer), str(raw)], check=True, timeout=60)
        command = ["dumpe2fs", "-h", str(raw)]
        head = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    return "needs_recovery" not in head and "state:         clean" in head


def layer_of(directory: str) -> Path:
    """Returns the layer in a VM's directory, which contains nothing else."""
    (layer,) = Path(directory).iterdir()
    return layer
