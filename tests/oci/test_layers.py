"""Layers become EROFS file systems with all that a container has in them; damaged and hostile ones become errors."""

from __future__ import annotations

import gzip
import hashlib
import os
import stat
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, strategies as st

from tests.oci.kit import TIME, as_root, compress, extract, needs_erofs, sha256, small_disk, tar
from tests.system.kit import load
from volant.oci import OciError, digest_of
from volant.oci._job import ImageJob, check_end, run
from volant.oci._layers import LayerJob
from volant.oci._tar import TarCheck

pytestmark = [pytest.mark.programs, needs_erofs]

LOWER = tar(
    ("etc", {}),
    ("etc/changed", {"data": b"lower" * 3000}),
    ("etc/gone", {"data": b"x"}),
    ("opaque", {}),
    ("opaque/old", {"data": b"x"}),
    ("bin/su", {"data": b"#!" * 5000, "mode": 0o4755, "uid": 0, "gid": 42}),
    ("bin/same", {"same_as": "bin/su"}),
    ("bin/link", {"to": "/etc/changed"}),
    ("owned", {"data": b"", "uid": 1000, "gid": 1001, "mode": 0o640}),
    ("marked", {"data": b"x", "pax_headers": {"SCHILY.xattr.user.key": "value", "SCHILY.xattr.security.x-y": "z"}}),
    ("pipe", {"type": tarfile.FIFOTYPE}),
    ("a/" * 60 + "long", {"data": b"deep"}),
    ("../../outside", {"data": b"inside"}),
    ("/absolute", {"data": b"inside"}),
)
UPPER = tar(
    ("./", {}),
    ("etc", {}),
    ("etc/.wh.gone", {"data": b""}),
    ("etc/changed", {"data": b"upper", "mode": 0o600}),
    ("opaque", {}),
    ("opaque/.wh..wh..opq", {"data": b""}),
    ("opaque/new", {"data": b"new"}),
)


def jobs(directory: Path, *layers: bytes, kind: str = "tar+gzip") -> ImageJob:
    directory.mkdir(exist_ok=True)
    found = []
    for number, layer in enumerate(layers):
        blob = directory / f"{number}.blob"
        blob.write_bytes(data := compress(layer, kind))
        found.append(
            LayerJob(str(blob), digest_of(data), len(data), digest_of(layer), str(directory / f"{number}.erofs"))
        )
    return ImageJob(
        tuple(found),
        tuple(job.target for job in found),
        str(directory / "correcting.erofs"),
        str(directory / "metadata.erofs"),
    )


def refused(directory: Path, job: ImageJob) -> OciError:
    with pytest.raises(OciError) as caught:
        run(job)
    assert not (directory / "metadata.erofs").exists()
    return caught.value


@as_root
@pytest.mark.parametrize("kind", ["tar", "tar+gzip", "tar+zstd"])
def test_layers_join_to_the_tree_that_a_container_would_see(tmp_path: Path, kind: str) -> None:
    job = jobs(tmp_path, LOWER, UPPER, kind=kind)
    run(job)
    tree = extract(Path(job.metadata), map(Path, job.layers), tmp_path / "tree")

    assert (tree / "etc/changed").read_bytes() == b"upper"
    assert stat.S_IMODE((tree / "etc/changed").stat().st_mode) == 0o600
    whiteout = (tree / "etc/gone").stat()
    assert stat.S_ISCHR(whiteout.st_mode)
    assert whiteout.st_rdev == 0
    assert [path.name for path in (tree / "opaque").iterdir()] == ["new"]
    su = (tree / "bin/su").stat()
    assert (stat.S_IMODE(su.st_mode), su.st_gid, su.st_size, su.st_mtime) == (0o4755, 42, 10000, TIME)
    assert (tree / "bin/same").stat().st_ino == su.st_ino
    assert (tree / "bin/link").readlink() == Path("/etc/changed")
    owned = (tree / "owned").stat()
    assert (owned.st_uid, owned.st_gid, stat.S_IMODE(owned.st_mode)) == (1000, 1001, 0o640)
    assert os.getxattr(tree / "marked", "user.key") == b"value"
    assert stat.S_ISFIFO((tree / "pipe").stat().st_mode)
    assert (tree / ("a/" * 60) / "long").read_bytes() == b"deep"
    # Names that would lead elsewhere are names in the image.
    assert (tree / "outside").read_bytes() == (tree / "absolute").read_bytes() == b"inside"
    assert not (tmp_path / "outside").exists()


@as_root
def test_a_disk_that_fills_up_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As if others filled it after the check.
    monkeypatch.setattr("volant.store._files._RESERVE_BYTES", 0)
    with small_disk(tmp_path / "small", size_mb=4) as directory:
        job = jobs(directory, tar(("data", {"data": os.urandom(2**20) * 16})), kind="tar+zstd")
        error = refused(directory, job)
    assert (error.code, "make room" in error.hint) == ("cache_full", True), error


def test_the_same_layer_gives_the_same_bytes(tmp_path: Path) -> None:
    files = []
    for name, kind in (("first", "tar+gzip"), ("second", "tar+zstd")):
        run(job := jobs(tmp_path / name, LOWER, UPPER, kind=kind))
        files.append([sha256(Path(path)) for path in (*job.layers, job.metadata)])
    assert files[0] == files[1]


def test_an_image_may_have_forty_layers(tmp_path: Path) -> None:
    layers = [tar(("common", {"data": b"%d" % number}), (f"only-{number}", {"data": b"x"})) for number in range(40)]
    run(job := jobs(tmp_path, *layers, kind="tar"))
    tree = extract(Path(job.metadata), map(Path, job.layers), tmp_path / "tree")
    assert (tree / "common").read_bytes() == b"39"
    assert len(list(tree.iterdir())) == 41


def test_members_and_padding_of_gzip_are_read(tmp_path: Path) -> None:
    halves = gzip.compress(LOWER[:5000]) + bytes(1000) + gzip.compress(LOWER[5000:]) + bytes(70000)
    job = jobs(tmp_path, LOWER)
    Path(job.convert[0].blob).write_bytes(halves)
    layer = msgspec.structs.replace(job.convert[0], digest=digest_of(halves), size=len(halves))
    run(msgspec.structs.replace(job, convert=(layer,)))


def test_what_follows_the_end_of_the_archive_counts_for_the_digest_only(tmp_path: Path) -> None:
    run(jobs(tmp_path / "padded", LOWER + b"not a header" * 1000))
    run(jobs(tmp_path / "whole", LOWER))
    assert sha256(tmp_path / "padded/0.erofs") == sha256(tmp_path / "whole/0.erofs")


def test_other_bytes_than_promised_are_refused(tmp_path: Path) -> None:
    job = jobs(tmp_path, LOWER)
    (layer,) = job.convert
    other = digest_of(b"other")
    for change, says in (
        ({"digest": other}, f"the digest of layer {other} is {layer.digest}"),
        ({"diff_id": other}, f"is {layer.diff_id}, the configuration says {other}"),
        ({"size": layer.size + 1}, f"has {layer.size} bytes, the manifest says {layer.size + 1}"),
    ):
        changed = msgspec.structs.replace(job, convert=(msgspec.structs.replace(layer, **change),))
        error = refused(tmp_path, changed)
        assert error.code == "image_mismatch"
        assert says in error.message


@pytest.mark.parametrize("kind", ["tar+gzip", "tar+zstd"])
def test_a_damaged_or_cut_layer_is_refused(tmp_path: Path, kind: str) -> None:
    whole = compress(LOWER, kind)
    for data in (whole[: len(whole) // 2], whole[:50] + b"x" * 20 + whole[70:]):
        job = jobs(tmp_path, LOWER, kind=kind)
        Path(job.convert[0].blob).write_bytes(data)
        layer = msgspec.structs.replace(job.convert[0], digest=digest_of(data), size=len(data))
        error = refused(tmp_path, msgspec.structs.replace(job, convert=(layer,)))
        assert error.code in ("image_invalid", "image_mismatch")


def test_a_decompression_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path) -> None:
    compressor = zlib.compressobj(9, wbits=31)
    info = tarfile.TarInfo("zeros")
    info.size = 2**33
    bomb = compressor.compress(info.tobuf()) + b"".join(compressor.compress(bytes(2**20)) for _ in range(200))
    bomb += compressor.flush(zlib.Z_SYNC_FLUSH)
    job = jobs(tmp_path, LOWER)
    Path(job.convert[0].blob).write_bytes(bomb)
    # As if the manifest promised a small layer: the compressed size bounds the other.
    layer = msgspec.structs.replace(job.convert[0], digest=digest_of(bomb), size=len(bomb))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("volant.oci._layers._MAX_RATIO", 100)
        error = refused(tmp_path, msgspec.structs.replace(job, convert=(layer,)))
    assert error.code == "image_too_large"
    assert (tmp_path / "0.erofs").stat().st_blocks * 512 < 2**28


def test_too_many_entries_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volant.oci._tar.MAX_ENTRIES", 3)
    error = refused(tmp_path, jobs(tmp_path, tar(*[(f"f{number}", {"data": b""}) for number in range(4)])))
    assert (error.code, error.message) == ("image_too_large", "the layer has more than 3 entries")


def changed(layer: bytes, at: int, field: bytes) -> bytes:
    """Changes a field of the first header, and corrects the checksum."""
    header = bytearray(layer[:512])
    header[at : at + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + layer[512:]


ONE = tar(("file", {"data": b"x" * 600}))


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (tar(("dev/sda", {"type": tarfile.BLKTYPE})), "the layer has the device 'dev/sda'"),
        (tar(("dev/null", {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 3})), "the device 'dev/null'"),
        # The bits of a directory and of a character device make a block device.
        (changed(tar(("d", {})), 100, b"0020755\0"), "a mode of another kind"),
        (changed(ONE, 100, b"0060644\0"), "a mode of another kind"),
        (changed(ONE, 156, b"S"), "unknown kind b'S'"),
        (changed(ONE, 156, b"5"), "has data and is no file"),
        (changed(ONE, 124, b"-0000001130\0"), "wrong size"),
        (changed(ONE, 124, b"\xff" * 12), "wrong size"),
        (ONE[:148] + b"0000000\0" + ONE[156:], "wrong checksum"),
        (ONE[:700], "cut off"),
        (ONE[:300], "cut off"),
        (ONE[:1536] + bytes(512) + ONE, "zeros between two entries"),
        (tar(("f", {"data": b"", "pax_headers": {"GNU.sparse.major": "1"}})), "GNU.sparse.major"),
        *(
            (tar(("f", {"data": b"", "pax_headers": {f"{how}.xattr.{name}": "Lw"}})), f"{how}.xattr.{name}")
            for how in ("SCHILY", "LIBARCHIVE")
            for name in ("trusted.overlay.redirect", "user.overlay.redirect", "trusted.x", "%74rusted.x", "userx", "")
        ),
        (tar(("f", {"data": b"", "pax_headers": {"size": "-1"}})), "wrong size"),
        (tar(("f/" * 2100, {"data": b""})), "a name has 42"),
        (b"this is no tar" * 100, "wrong"),
    ],
)  # fmt: skip
def test_what_readers_could_understand_differently_is_refused(tmp_path: Path, layer: bytes, says: str) -> None:
    error = refused(tmp_path, jobs(tmp_path, layer))
    assert error.code == "image_invalid"
    assert says in error.message


@given(st.sampled_from([LOWER, UPPER, ONE]), st.integers(1, 3000))
def test_an_archive_passes_unchanged_in_pieces_of_any_size(layer: bytes, size: int) -> None:
    whole = TarCheck()
    passed = whole.feed(layer) + whole.finish()
    check = TarCheck()
    pieces = [check.feed(layer[at : at + size]) for at in range(0, len(layer), size)]
    assert b"".join([*pieces, check.finish()]) == passed
    # What is missing comes at the end.
    assert passed.startswith(layer.rstrip(b"\0"))


@given(st.sampled_from([LOWER, UPPER]), st.integers(0, 4000), st.binary(min_size=1, max_size=20))
def test_a_changed_archive_passes_or_is_refused(layer: bytes, at: int, change: bytes) -> None:
    check = TarCheck()
    try:
        check.feed(layer[:at] + change + layer[at + len(change) :])
        check.finish()
    except OciError as error:
        code = error.code
    else:
        code = "image_invalid"
    assert code == "image_invalid"


def test_an_archive_without_an_end_gets_one(tmp_path: Path) -> None:
    run(jobs(tmp_path / "open", ONE[:1536]))
    run(jobs(tmp_path / "whole", ONE))
    assert sha256(tmp_path / "open/0.erofs") == sha256(tmp_path / "whole/0.erofs")


def test_headers_without_an_entry_at_the_end_say_nothing(tmp_path: Path) -> None:
    # As `git archive` writes them, of nothing.
    comment = b"15 comment=abc\n"
    header = tarfile.TarInfo("pax_global_header")
    header.type, header.size = tarfile.XGLTYPE, len(comment)
    run(jobs(tmp_path / "comment", ONE[:1536] + header.tobuf() + comment.ljust(512, b"\0")))
    run(jobs(tmp_path / "whole", ONE))
    assert sha256(tmp_path / "comment/0.erofs") == sha256(tmp_path / "whole/0.erofs")


def big_layer(size: int) -> Iterator[bytes]:
    info = tarfile.TarInfo("big")
    info.size = size
    yield info.tobuf()
    for _ in range(size // 2**20):
        yield BLOCK
    yield bytes(1024)


BLOCK = bytes(2**20)


MEASURED = """
import resource, subprocess, sys
status = subprocess.run([sys.executable, "-m", "volant.oci"]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(status)
"""
"""Converts, and prints the most memory that it took in KiB. The kernel counts what a process had before its exec, too,
so a process that is small itself has to start it."""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_layer(tmp_path: Path) -> None:
    size = load("VOLANT_TEST_LAYER_BYTES", usual=2**29, full=2**31)
    job = jobs(tmp_path, LOWER)
    compressor = zlib.compressobj(1, wbits=31)
    plain, blob = hashlib.sha256(), Path(job.convert[0].blob)
    with blob.open("wb") as file:
        for piece in big_layer(size):
            plain.update(piece)
            file.write(compressor.compress(piece))
        file.write(compressor.flush())
    digest = f"sha256:{sha256(blob)}"
    layer = LayerJob(str(blob), digest, blob.stat().st_size, f"sha256:{plain.hexdigest()}", job.convert[0].target)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED],
        input=msgspec.json.encode(msgspec.structs.replace(job, convert=(layer,))),
        capture_output=True,
        timeout=120,
        check=False,
    )
    check_end(done.returncode, done.stdout)
    assert (tmp_path / "0.erofs").stat().st_size > size
    assert int(done.stderr.split()[-1]) < 400 * 1024


def test_an_error_of_the_process_is_reported_whole(tmp_path: Path) -> None:
    job = jobs(tmp_path, ONE[:700])
    done = subprocess.run(
        [sys.executable, "-m", "volant.oci"], input=msgspec.json.encode(job), capture_output=True, check=False
    )
    with pytest.raises(OciError, match="cut off") as caught:
        check_end(done.returncode, done.stdout + done.stderr)
    assert caught.value.hint
    with pytest.raises(OciError, match="died: status -9"):
        check_end(-9, b"")
