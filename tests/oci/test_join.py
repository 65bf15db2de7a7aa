"""Layers are joined to what a container would see, whatever they hide, replace and imply."""

from __future__ import annotations

import stat
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import example, given, strategies as st

from tests.oci.kit import as_root, extract, needs_erofs, tar
from tests.oci.test_layers import jobs
from volant.oci import OciError
from volant.oci._erofs import Erofs, opened
from volant.oci._job import run
from volant.oci._join import correction

pytestmark = [pytest.mark.programs, needs_erofs, as_root]

Parts = tuple[str, ...]


class Op(NamedTuple):
    """An entry of a layer: a directory, a file, a whiteout or an opaque directory."""

    kind: str
    path: Parts
    mode: int = 0o755


class Seen(NamedTuple):
    """What is somewhere: `mode` with the kind, and the number of the layer that a file is of."""

    mode: int
    owner: int
    layer: int


Tree = dict[Parts, Seen]
IMPLIED = Seen(stat.S_IFDIR | 0o755, 0, 0)


def apply(tree: Tree, layer: list[Op], number: int) -> Tree:
    """The rules: `layer.md` of the OCI's image specification."""
    tree = dict(tree)
    for op in layer:
        if op.kind in ("whiteout", "opaque"):
            for path in [path for path in tree if path[: len(op.path)] == op.path]:
                del tree[path]
    # Whiteouts last: those in a directory that is gone with this layer change nothing.
    gone = {op.path for op in layer if op.kind in ("whiteout", "file")}
    for op in sorted(layer, key=lambda op: (op.kind == "whiteout", len(op.path))):
        for depth in range(1, len(op.path) + (op.kind == "opaque")):
            path = op.path[:depth]
            if not stat.S_ISDIR(tree.get(path, Seen(0, 0, 0)).mode):
                if op.kind == "whiteout" and path in gone:
                    break
                tree[path] = IMPLIED
        if op.kind == "file":
            for path in [path for path in tree if path[: len(op.path)] == op.path]:
                del tree[path]
            tree[op.path] = Seen(stat.S_IFREG | op.mode, 0, number)
        elif op.kind == "directory":
            tree[op.path] = Seen(stat.S_IFDIR | op.mode, op.mode, 0)
    return tree


def archive(layer: list[Op], number: int) -> bytes:
    entries = list[tuple[str, dict[str, Any]]]()
    for op in layer:
        *parents, last = op.path
        if op.kind == "directory":
            entries.append(("/".join(op.path), {"mode": op.mode, "uid": op.mode}))
        elif op.kind == "file":
            entries.append(("/".join(op.path), {"data": b"%d" % number, "mode": op.mode}))
        elif op.kind == "whiteout":
            entries.append(("/".join((*parents, f".wh.{last}")), {"data": b""}))
        else:
            entries.append(("/".join((*op.path, ".wh..wh..opq")), {"data": b""}))
    return tar(*entries)


def seen(root: Path) -> Tree:
    found = Tree()
    for path in root.rglob("*"):
        info = path.lstat()
        if not stat.S_ISCHR(info.st_mode):
            layer = int(path.read_bytes()) if stat.S_ISREG(info.st_mode) else 0
            found[path.relative_to(root).parts] = Seen(info.st_mode, info.st_uid, layer)
        else:
            assert info.st_rdev == 0
    return found


def possible(layer: list[Op]) -> list[Op]:
    """Leaves out what no builder writes: two entries of one name, and entries below a file of the same layer."""
    found = list[Op]()
    for op in layer:
        twice = any(op.path == other.path and (op.kind == "whiteout") == (other.kind == "whiteout") for other in found)
        if not twice:
            found.append(op)
    files = {op.path for op in found if op.kind == "file"}
    return [
        op for op in found
        if op.kind == "whiteout" or not any(op.path[:depth] in files for depth in range(len(op.path)))
    ]  # fmt: skip


PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=3).map(tuple)
OPS = st.builds(
    Op,
    st.sampled_from(["directory", "file", "file", "whiteout", "opaque"]),
    PATHS,
    st.sampled_from([0o700, 0o755, 0o1777]),
)
LAYERS = st.lists(st.lists(OPS, max_size=6).map(possible), min_size=1, max_size=4)
A, AX, AY = ("a",), ("a", "x"), ("a", "y")


@given(LAYERS)
# A directory that is hidden, and made again: by the same layer, and by a later one.
@example([[Op("file", AX)], [Op("whiteout", A), Op("file", AY)]])
@example([[Op("file", AX)], [Op("file", AY), Op("whiteout", A)]])
@example([[Op("file", AX)], [Op("whiteout", A)], [Op("file", AY)]])
@example([[Op("file", AX)], [Op("file", A)], [Op("directory", A)]])
@example([[Op("file", AX)], [Op("directory", A), Op("opaque", A)], [Op("file", AY)]])
# Whiteouts below what is no directory any more.
@example([[Op("file", AX)], [Op("file", A), Op("whiteout", AX)]])
@example([[Op("file", AX)], [Op("whiteout", A), Op("whiteout", AX)]])
# Attributes of directories that a higher layer only implies.
@example([[Op("directory", A, 0o1777)], [Op("file", AX)], [Op("whiteout", AX)]])
def test_layers_join_as_the_specification_says(layers: list[list[Op]]) -> None:
    wanted = Tree()
    for number, layer in enumerate(layers):
        wanted = apply(wanted, layer, number)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        run(job := jobs(directory / "made", *(archive(layer, number) for number, layer in enumerate(layers))))
        tree = extract(Path(job.metadata), map(Path, job.layers), directory / "tree")
        assert seen(tree) == wanted


@pytest.fixture(scope="module")
def layer(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of a layer: its directories, the first of its files."""
    many = [(f"many/{number:04}", {"data": b"x"}) for number in range(400)]
    made = tar(*many, ("a/b", {"pax_headers": {"SCHILY.xattr.user.note": "x" * 50}}), ("a/b/c", {"data": b"x"}))
    run(job := jobs(tmp_path_factory.mktemp("layer") / "made", made))
    return Path(job.layers[0]).read_bytes()


@given(st.data())
def test_a_damaged_file_of_a_layer_is_read_or_refused(layer: bytes, data: st.DataObject) -> None:
    damaged = bytearray(layer)
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(1024, 40_000))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(layer)))
    code = "image_invalid"
    try:
        correction([Erofs(layer), Erofs(bytes(damaged)), Erofs(bytes(damaged[:cut]))])
    except OciError as error:
        code = error.code
    assert code == "image_invalid"


def test_attributes_of_directories_survive_what_lies_above(tmp_path: Path) -> None:
    note = {"pax_headers": {"SCHILY.xattr.user.note": "kept"}}
    deep = "d" * 60 + "/" + "e" * 60
    lower = tar(
        ("tmp", {"mode": 0o1777, **note}),
        ("home", {"uid": 3_000_000, "gid": 4_000_000, "mode": 0o2750}),
        (deep.partition("/")[0], {"mode": 0o711}),
        (deep, {"mode": 0o701}),
    )
    upper = tar(("tmp/x", {"data": b"1"}), ("home/new/x", {"data": b"1"}), (f"{deep}/x", {"data": b"1"}))
    run(job := jobs(tmp_path / "made", lower, upper))
    with opened(Path(job.metadata)) as joined:
        found = {}
        for path in ("tmp", "home", "home/new", deep):
            node = joined.root()
            for part in path.encode().split(b"/"):
                node = joined.node(joined.entries(node)[part].nid)
            found[path] = (stat.S_IMODE(node.mode), node.uid, node.gid, joined.xattrs(node).get(b"user.note"))
            assert (node.mtime == 0) == (path == "home/new")
    assert found == {
        "tmp": (0o1777, 0, 0, b"kept"),
        "home": (0o2750, 3_000_000, 4_000_000, None),
        "home/new": (0o755, 0, 0, None),
        deep: (0o701, 0, 0, None),
    }
