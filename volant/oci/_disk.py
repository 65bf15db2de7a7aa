"""Joins the file systems of an image to one disk, by a VMDK descriptor that a hypervisor reads.

The joined EROFS file system says at which block of one large device each layer begins. Linux mounts such a device
without a list of its layers (since 6.4). The descriptor makes that device out of the files, and copies nothing. A
machine has one disk for the image, whether it has one layer or a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ._erofs import BLOCK, opened
from ._errors import OciError

DISK = "disk.vmdk"
_SECTOR = 512
_HEAD = """\
# Disk DescriptorFile
version=1
CID=fffffffe
parentCID=ffffffff
createType="twoGbMaxExtentFlat"
"""


def disk_path(cache_dir: Path, digest: str) -> Path:
    """Returns where the disk of an image lies, whether or not it is in the cache."""
    return cache_dir / "oci" / "images" / digest.removeprefix("sha256:") / DISK


def descriptor(metadata: Path, layers: Sequence[Path]) -> str:
    """Returns the content of `DISK` for files that lie beside it. Blocks.

    :raises OciError: `image_invalid`, they don't belong together. :raises OSError:
    """
    first = metadata.stat().st_size // BLOCK
    text = _HEAD + _extent(metadata, first)
    with opened(metadata) as joined:
        devices = joined.devices()
    if len(devices) != len(layers):
        raise _invalid(f"{len(devices)} layers are joined, and there are {len(layers)}")
    for (blocks, start), layer in zip(devices, layers, strict=True):
        if start != first or layer.stat().st_size != blocks * BLOCK:
            raise _invalid(f"{layer.name} is not where the joined file system expects it")
        text += _extent(layer, blocks)
        first += blocks
    return text


def _extent(path: Path, blocks: int) -> str:
    # QEMU ignores an extent that is not RW; whoever opens the disk opens it read-only.
    return f'RW {blocks * BLOCK // _SECTOR} FLAT "{path.name}" 0\n'


def _invalid(why: str) -> OciError:
    return OciError("image_invalid", f"the layers can't be joined: {why}", "report it with the name of the image")
