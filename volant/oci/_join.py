"""Creates the layer above the layers of an image that makes `mkfs.erofs` join them like in a container.

`mkfs.erofs` 1.8 shows the union of all layers, with the topmost entry for each name. That is wrong in two cases, which
this module finds and corrects with one more layer on top:

- A layer hides entries below with an opaque directory or a non-directory, and a higher layer has a directory there
  again: the hidden entries would be visible. Whiteouts hide them.
- A directory that its layer only implies (`_tree.py`) would hide the attributes that a lower layer gives it. An entry
  has them again.
"""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ._erofs import BLOCK, Entry, Erofs, Node, damaged, opened
from ._errors import OciError
from ._tree import IMPLIED, MAX_ENTRIES, WHITEOUT, Parts, entry

# Joins the file systems of an image to one disk, by a VMDK descriptor that a hypervisor reads.
#
# The joined EROFS file system says at which block of one large device each layer begins. Linux mounts such a device
# without a list of its layers (since 6.4). The descriptor makes that device out of the files, and copies nothing. A
# machine has one disk for the image, whether it has one layer or a hundred.


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
    """Returns the path of an image's disk, whether or not it is in the cache."""
    return cache_dir / "oci" / "images" / digest.removeprefix("sha256:") / DISK


def descriptor(metadata: Path, layers: Sequence[Path]) -> str:
    """Returns the content of `DISK` for files in the same directory. Blocks.

    :raises OciError: `image_invalid`, they don't belong together. :raises OSError: they can't be read.
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


_OPAQUE = b"trusted.overlay.opaque"
_OURS = b"trusted."
"""The prefix of attributes that control overlayfs in the guest, which images must not have."""
_MAX_DEPTH = 2048
"""Maximum depth, the depth of a name of 4,096 bytes. A damaged file may contain a directory in itself."""


class _Place(NamedTuple):
    """A directory in one of the layers."""

    layer: Erofs
    node: Node
    xattrs: Mapping[bytes, bytes]


class _Directory(NamedTuple):
    """A directory in several layers, topmost first; `visible` is the number of them that a container would see."""

    path: Parts
    places: Sequence[_Place]
    visible: int


def correction(layers: Sequence[Erofs]) -> bytes:
    """Returns the entries of a tar for the layer above `layers`, which are given lowest first.

    :raises OciError: `image_invalid`
    """
    places = [_place(layer, layer.root()) for layer in reversed(layers)]
    waiting = [_Directory((), places, len(places))]
    directories: dict[Parts, _Place] = {}
    wrong = set[Parts]()
    hidden = list[Parts]()
    while waiting:
        directory = waiting.pop()
        own = next((place for place in directory.places[: directory.visible] if IMPLIED not in place.xattrs), None)
        directories[directory.path] = own or directory.places[0]
        if own is not None and own is not directory.places[0]:
            wrong.add(directory.path)
        for name, found in _occurrences(directory).items():
            path = (*directory.path, name)
            if found[0][0] >= directory.visible:
                hidden.append(path)
            elif found[0][1].is_directory and len(found) > 1:
                if len(path) > _MAX_DEPTH or len(directories) > MAX_ENTRIES:
                    raise damaged()
                below = _below(directory, path, found)
                # If the topmost is opaque, nothing is joined.
                if _OPAQUE not in below.places[0].xattrs:
                    waiting.append(below)
    needed = {path[:depth] for path in hidden for depth in range(1, len(path))}
    needed |= {path[:depth] for path in wrong for depth in range(1, len(path) + 1)}
    return b"".join(
        [
            *(_entry(path, directories[path]) for path in sorted(needed)),
            *(entry(b"/".join((*path[:-1], WHITEOUT + path[-1])), stat.S_IFREG) for path in sorted(hidden)),
        ]
    )


def _occurrences(directory: _Directory) -> dict[bytes, list[tuple[int, Entry]]]:
    """Returns the places that contain each name, by their numbers."""
    found: dict[bytes, list[tuple[int, Entry]]] = {}
    for number, place in enumerate(directory.places):
        for name, each in place.layer.entries(place.node).items():
            found.setdefault(name, []).append((number, each))
    return found


def _below(parent: _Directory, path: Parts, found: Sequence[tuple[int, Entry]]) -> _Directory:
    """Returns a directory in a directory: the topmost of several entries with one name."""
    places = list[_Place]()
    visible: int | None = None
    for number, each in found:
        if visible is None and (number >= parent.visible or not each.is_directory):
            visible = len(places)
        if each.is_directory:
            layer = parent.places[number].layer
            places.append(_place(layer, layer.node(each.nid)))
            if visible is None and _OPAQUE in places[-1].xattrs:
                visible = len(places)
    return _Directory(path, places, len(places) if visible is None else visible)


def _place(layer: Erofs, node: Node) -> _Place:
    return _Place(layer, node, layer.xattrs(node))


def _entry(path: Parts, place: _Place) -> bytes:
    node = place.node
    xattrs = {name: value for name, value in place.xattrs.items() if not name.startswith(_OURS)}
    return entry(b"/".join(path) + b"/", node.mode, node.uid, node.gid, node.mtime, xattrs)
