"""What an empty volume receives, and what becomes of a copy that was cut off."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from volant.guest import _copy_up
from volant.guest._copy_up import MARKER, copy_up, is_unfinished


@pytest.fixture
def source(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    (source / "closed" / "deep").mkdir(parents=True)
    (source / "closed" / "deep" / "file").write_bytes(b"x" * 100_000)
    (source / "tool").write_text("tool")
    os.link(source / "tool", source / "same")
    (source / "tool").chmod(0o4755)
    (source / "secret").symlink_to("/etc/shadow")
    (source / "up").symlink_to("../../../..")
    os.mkfifo(source / "fifo", 0o620)
    os.close(os.open(os.fsencode(source) + b"/\xff\n", os.O_CREAT | os.O_WRONLY, 0o640))
    os.utime(source / "secret", ns=(5, 6), follow_symlinks=False)
    os.utime(source / "closed" / "deep" / "file", ns=(7, 8))
    os.utime(source / "closed" / "deep", ns=(9, 10))
    (source / "closed").chmod(0o2750)
    source.chmod(0o1771)
    return source


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    volume = tmp_path / "volume"
    volume.mkdir()
    return volume


def tree(top: Path) -> dict[bytes, tuple[object, ...]]:
    """All that is in a directory, by path: kind and mode, owner, time, size, content, number of names."""
    found: dict[bytes, tuple[object, ...]] = {}
    for path, directories, files in os.walk(os.fsencode(top)):
        for name in (b".", *directories, *files):
            full = os.path.join(path, name)  # noqa: PTH118 - bytes
            seen = os.lstat(full)
            is_directory = stat.S_ISDIR(seen.st_mode)
            content: bytes = b""
            if stat.S_ISLNK(seen.st_mode):
                content = os.readlink(full)  # noqa: PTH115 - bytes
            elif stat.S_ISREG(seen.st_mode):
                content = Path(os.fsdecode(full)).read_bytes()
            found[os.path.relpath(full, os.fsencode(top))] = (
                stat.filemode(seen.st_mode), seen.st_uid, seen.st_gid,
                0 if full.endswith(b"/.") and path == os.fsencode(top) else seen.st_mtime_ns,
                0 if is_directory else seen.st_size, content, 0 if is_directory else seen.st_nlink,
            )  # fmt: skip
    return found


def test_an_empty_volume_receives_what_it_hides(source: Path, volume: Path) -> None:
    (volume / "lost+found").mkdir()
    copy_up(f"{source}/.", f"{volume}/.")
    assert tree(volume) == tree(source)
    assert (volume / "same").samefile(volume / "tool")


def test_a_directory_without_content_gives_owner_and_mode(tmp_path: Path, volume: Path) -> None:
    (volume / "lost+found").mkdir()
    empty = tmp_path / "empty"
    empty.mkdir()
    empty.chmod(0o750)
    copy_up(str(empty), str(volume))
    assert (list(volume.iterdir()), stat.S_IMODE(volume.stat().st_mode)) == ([], 0o750)


@pytest.mark.parametrize("name", ["file", "lost+found/file", "lost+found"])
def test_content_is_kept(source: Path, volume: Path, name: str) -> None:
    (volume / name).parent.mkdir(exist_ok=True)
    (volume / name).write_text("mine")
    before = tree(volume)
    copy_up(str(source), str(volume))
    assert tree(volume) == before


def test_without_a_source_a_volume_is_made_empty_and_no_more(volume: Path) -> None:
    (volume / "lost+found").mkdir()
    copy_up(None, str(volume))
    assert list(volume.iterdir()) == []


def test_a_copy_that_was_cut_off_is_made_again(
    source: Path, volume: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _copy_up._copy_data
    copied = []

    def copy_data(one: str, other: str) -> None:
        whole(one, other)
        copied.append(one)
        if len(copied) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(_copy_up, "_copy_data", copy_data)
    with pytest.raises(OSError, match="No space left"):
        copy_up(str(source), str(volume))
    assert is_unfinished(str(volume))
    assert len(list(volume.iterdir())) > 1
    other = tmp_path / "other"
    other.mkdir()
    (other / "only").write_text("other")
    copy_up(str(other), str(volume))
    assert [path.name for path in volume.iterdir()] == ["only"]
    assert not is_unfinished(str(volume))


def test_a_marker_in_a_volume_without_a_source_leaves_it_empty(volume: Path) -> None:
    (volume / MARKER).touch()
    (volume / "directory").mkdir()
    (volume / "directory" / MARKER).touch()
    (volume / "link").symlink_to("directory")
    copy_up(None, str(volume))
    assert list(volume.iterdir()) == []


def test_extended_attributes_are_copied(source: Path, volume: Path) -> None:
    try:
        os.setxattr(source / "tool", "user.kind", b"hammer")
    except OSError:
        pytest.skip("the file system has no extended attributes of users")
    copy_up(str(source), str(volume))
    assert os.getxattr(volume / "tool", "user.kind") == b"hammer"
