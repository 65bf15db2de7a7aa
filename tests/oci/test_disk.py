"""The layers of an image are one disk, if they fit together."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.oci.kit import needs_erofs
from volant.oci import OciError
from volant.oci._join import descriptor

pytestmark = [pytest.mark.programs, needs_erofs]

_OPTIONS = ("-Enoinline_data", "--tar=f", "--aufs", "-U", "clear", "-T0", "--mkfs-time")


@pytest.fixture
def layers(tmp_path: Path) -> list[Path]:
    made = []
    for number in range(3):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / "file").write_bytes(b"%d" % number * 9000 * (number + 1))
        _run("tar", "-C", tmp_path / f"{number}", "-cf", tmp_path / f"{number}.tar", ".")
        _run("mkfs.erofs", *_OPTIONS, tmp_path / f"{number}.erofs", tmp_path / f"{number}.tar")
        made.append(tmp_path / f"{number}.erofs")
    return made


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def joined(directory: Path, layers: Sequence[Path]) -> Path:
    _run("mkfs.erofs", "--aufs", directory / "metadata.erofs", *layers)
    return directory / "metadata.erofs"


@pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")
def test_a_hypervisor_sees_the_files_one_after_the_other(tmp_path: Path, layers: list[Path]) -> None:
    metadata = joined(tmp_path, layers)
    (tmp_path / "disk.vmdk").write_text(descriptor(metadata, layers))
    _run("qemu-img", "convert", "-f", "vmdk", "-O", "raw", tmp_path / "disk.vmdk", tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == b"".join(path.read_bytes() for path in (metadata, *layers))


def test_an_image_of_one_layer_has_a_disk_too(tmp_path: Path, layers: list[Path]) -> None:
    assert descriptor(joined(tmp_path, layers[:1]), layers[:1]).count("FLAT") == 2


def test_layers_in_another_order_or_number_are_refused(tmp_path: Path, layers: list[Path]) -> None:
    metadata = joined(tmp_path, layers)
    for others in (layers[::-1], layers[:2], [*layers, layers[0]]):
        with pytest.raises(OciError, match="can't be joined") as refused:
            descriptor(metadata, others)
        assert refused.value.code == "image_invalid"


def test_a_file_system_that_is_cut_off_or_none_is_refused(tmp_path: Path, layers: list[Path]) -> None:
    whole = joined(tmp_path, layers).read_bytes()
    for data in (b"", bytes(4096), whole[:1100], whole[:1200]):
        (tmp_path / "metadata.erofs").write_bytes(data)
        with pytest.raises(OciError, match="damaged"):
            descriptor(tmp_path / "metadata.erofs", layers)
