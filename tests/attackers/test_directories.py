"""No other local user owns or can replace a directory that the daemon uses."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from tests.attackers.local_user import NOBODY, make_directory, make_link, needs_root, run_code
from volant.daemon._directories import DirectoryError, claimed, memory_dir
from volant.daemon._settings import Settings
from volant.daemon._sockets import ListenError, listening
from volant.host import Host, make_own_directory

REPOSITORY = Path(__file__).resolve().parents[2]
SQUATTED = ("state_dir", "runtime_dir", "cache_dir")


@pytest.fixture
def settings(root: Path) -> Iterator[Settings]:
    found = Settings(state_dir=root / "s", runtime_dir=root / "r", cache_dir=root / "c")
    yield found
    memory = memory_dir(found)
    if memory.is_symlink():
        memory.unlink()
    shutil.rmtree(memory, ignore_errors=True)


def claim(settings: Settings) -> None:
    with claimed(settings):
        pass


@needs_root
@pytest.mark.parametrize("kind", ["directory", "open directory", "link"])
def test_memory_is_not_stored_in_what_another_user_has_put_there(
    settings: Settings, root: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    memory, ours = memory_dir(settings), root / "ours"
    ours.mkdir(mode=0o700)
    if kind == "link":
        make_link(memory, ours)
    else:
        make_directory(memory, 0o777 if kind == "open directory" else 0o755)
    with claimed(settings):
        assert (memory.lstat().st_uid, stat.S_IMODE(memory.lstat().st_mode)) == (0, 0o700)
        (aside,) = memory.parent.glob(f"{memory.name}.*")
        assert aside.lstat().st_uid == NOBODY.pw_uid, "it is not taken over either"
        assert f"{memory} belonged to the user {NOBODY.pw_uid}" in caplog.text
        assert stat.S_IMODE(ours.stat().st_mode) == 0o700
    aside.unlink() if kind == "link" else aside.rmdir()


@needs_root
def test_a_directory_that_another_user_recreated_is_not_used(root: Path) -> None:
    root.chmod(0o1777)
    place = root / "memory"
    make_directory(place)
    with pytest.raises(OSError, match="belongs to the user nobody"):
        trio.run(Host().files.mkdir, place)
    shutil.rmtree(place)
    make_link(place, root)
    with pytest.raises(OSError, match="is a symbolic link that the user nobody made"):
        trio.run(Host().files.mkdir, place)


@needs_root
@pytest.mark.parametrize("name", SQUATTED)
def test_no_directory_of_the_daemon_may_belong_to_another_user(settings: Settings, root: Path, name: str) -> None:
    root.chmod(0o1777)
    make_directory(getattr(settings, name))
    with pytest.raises(DirectoryError, match="belongs to the user nobody"):
        claim(settings)


@needs_root
@pytest.mark.parametrize("name", ["s/disks", "s/logs", "s/templates", "s/snapshots", "s/standby", "r/vms", "r/net"])
def test_no_directory_inside_may_belong_to_another_user(settings: Settings, root: Path, name: str) -> None:
    (root / name).parent.mkdir(mode=0o700)
    (root / name).mkdir(mode=0o700)
    os.chown(root / name, NOBODY.pw_uid, NOBODY.pw_gid)
    with pytest.raises(DirectoryError, match=f"{name} belongs to the user nobody"):
        claim(settings)


@needs_root
@pytest.mark.parametrize("name", SQUATTED)
def test_no_other_user_can_replace_a_parent_directory(settings: Settings, root: Path, name: str) -> None:
    above = root / "above"
    above.mkdir()
    above.chmod(0o777)
    moved = Settings(**{**{each: getattr(settings, each) for each in SQUATTED}, name: above / "d"})
    with pytest.raises(DirectoryError, match=rf"every user can write in {above}.*chmod o-w {above}"):
        claim(moved)


@needs_root
@pytest.mark.parametrize(
    "way", [lambda path: make_directory(path, 0o755), lambda path: make_link(path, path.parent.parent)]
)
def test_creating_a_parent_directory_first_gains_nothing(
    settings: Settings, root: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[Path], None]
) -> None:
    (root / "all").mkdir()
    (root / "all").chmod(0o1777)
    above = root / "all" / "above"

    def late(path: Path, mode: int = 0o700) -> str | None:
        if path == above / "own" and not os.path.lexists(above):
            way(above)
        return make_own_directory(path, mode)

    monkeypatch.setattr("volant.daemon._directories.make_own_directory", late)
    with pytest.raises(DirectoryError, match="belongs to the user nobody"):
        claim(msgspec.structs.replace(settings, runtime_dir=above / "own"))


@needs_root
def test_a_link_of_another_user_is_not_followed(settings: Settings, root: Path) -> None:
    root.chmod(0o1777)
    (root / "ours").mkdir(mode=0o700)
    make_link(settings.state_dir, root / "ours")
    with pytest.raises(DirectoryError, match="s belongs to the user nobody"):
        claim(settings)


def test_a_link_of_the_operator_is_followed(settings: Settings, root: Path) -> None:
    (root / "disk").mkdir(mode=0o700)
    (root / "other").mkdir(mode=0o700)
    settings.state_dir.symlink_to(root / "disk")
    (root / "disk" / "logs").symlink_to(root / "other")
    claim(settings)
    assert (root / "disk" / "disks").is_dir()
    assert stat.S_IMODE((root / "other").stat().st_mode) == 0o700


def test_modes_of_the_daemons_directories_are_corrected(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    places = (settings.state_dir, settings.runtime_dir, settings.cache_dir, memory_dir(settings))
    for place in places:
        place.mkdir()
        place.chmod(0o777)
    with claimed(settings):
        assert [stat.S_IMODE(place.stat().st_mode) for place in places] == [0o755] * 4
    assert f"{settings.state_dir} could be written to by other users (mode 0777)" in caplog.text


@needs_root
def test_a_world_writable_directory_with_foreign_files_is_refused(settings: Settings) -> None:
    settings.state_dir.mkdir()
    settings.state_dir.chmod(0o777)
    run_code("import sys; open(sys.argv[1], 'w').close()", settings.state_dir / "volant.db")
    with pytest.raises(DirectoryError, match=r"volant\.db in it belongs to the user nobody"):
        claim(settings)


def test_new_parent_directories_are_private_with_any_umask(settings: Settings, root: Path) -> None:
    before = os.umask(0)
    try:
        claim(Settings(state_dir=root / "a/b/s", runtime_dir=root / "r", cache_dir=root / "c"))
    finally:
        os.umask(before)
    assert [stat.S_IMODE((root / each).stat().st_mode) for each in ("a", "a/b", "a/b/s")] == [0o711, 0o711, 0o700]


def test_no_socket_is_bound_where_every_user_can_replace_it(settings: Settings, root: Path) -> None:
    open_to_all = root / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    there = msgspec.structs.replace(settings, api_listen_addr=f"unix:{open_to_all}/volant.sock")
    with pytest.raises(ListenError, match=f"every user can write in {open_to_all}"), listening(there):
        pass
    open_to_all.chmod(0o1777)
    with listening(there):
        assert stat.S_IMODE((open_to_all / "volant.sock").stat().st_mode) == 0o660
