"""A daemon has its directories for itself, and an ephemeral one deletes only what it created."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest

from volant.daemon._directories import DirectoryError, claimed, memory_dir, remove
from volant.daemon._settings import Settings


def made(path: Path, name: str, *, ephemeral: bool = False, **places: Path) -> Settings:
    usual: dict[str, Any] = {
        "state_dir": path / f"{name}s",
        "runtime_dir": path / f"{name}r",
        "cache_dir": path / "cache",
    }
    return Settings(**{**usual, **places}, ephemeral=ephemeral)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    for name in ("", "a", "b"):
        shutil.rmtree(memory_dir(made(tmp_path, name)), ignore_errors=True)


def claim(settings: Settings) -> None:
    with claimed(settings):
        pass


def test_two_daemons_share_neither_state_nor_runtime_directory(path: Path) -> None:
    one = made(path, "a")
    with claimed(one):
        here = rf"another volantd \(process {os.getpid()}\) uses {{}}; stop it, or use another {{}}"
        with pytest.raises(DirectoryError, match=here.format(one.state_dir, "--state-dir")):
            claim(made(path, "b", state_dir=one.state_dir))
        with pytest.raises(DirectoryError, match=here.format(one.runtime_dir, "--runtime-dir")):
            claim(made(path, "b", runtime_dir=one.runtime_dir))
        claim(made(path, "b"))  # they share the cache
    claim(made(path, "b", runtime_dir=one.runtime_dir))


def test_one_directory_may_serve_as_both(path: Path) -> None:
    claim(made(path, "a", runtime_dir=path / "as"))


def test_a_lock_without_a_process_id_is_respected(path: Path) -> None:
    one = made(path, "a")
    with claimed(one):
        (one.state_dir / "lock").write_text("")
        with pytest.raises(DirectoryError, match="another volantd uses"):
            claim(made(path, "b", state_dir=one.state_dir))


@pytest.mark.parametrize("place", ["state_dir", "runtime_dir"])
def test_an_ephemeral_daemon_does_not_start_on_foreign_files(path: Path, place: str) -> None:
    settings = made(path, "a", ephemeral=True)
    strange = getattr(settings, place) / "thesis.txt"
    strange.parent.mkdir()
    strange.write_text("years of work")
    option = place.replace("_", "-")
    with pytest.raises(DirectoryError, match=rf"contains thesis\.txt, which no ephemeral .* use another --{option}"):
        claim(settings)
    assert strange.read_text() == "years of work"
    assert [each.name for each in strange.parent.iterdir()] == ["thesis.txt"]


def test_an_ephemeral_daemon_does_not_start_on_another_daemons_state(path: Path) -> None:
    settings = made(path, "a")
    claim(settings)
    with pytest.raises(DirectoryError, match="omit --ephemeral"):
        claim(msgspec.structs.replace(settings, ephemeral=True))


def test_an_ephemeral_daemon_does_not_start_on_orphaned_guest_memory(path: Path) -> None:
    settings = made(path, "a", ephemeral=True)
    memory_dir(settings).mkdir(mode=0o700)
    (memory_dir(settings) / "1.mem").touch()
    with pytest.raises(DirectoryError, match=r"contains 1\.mem"):
        claim(settings)


def test_an_ephemeral_daemon_can_follow_a_killed_one(path: Path) -> None:
    settings = made(path, "a", ephemeral=True)
    claim(settings)
    (settings.state_dir / "volant.db").touch()
    with claimed(settings):
        remove(settings)
    assert not settings.state_dir.exists()
    assert not settings.runtime_dir.exists()
    assert not memory_dir(settings).exists()


def test_directories_of_a_persistent_daemon_are_no_longer_ephemeral(path: Path) -> None:
    settings = made(path, "a", ephemeral=True)
    claim(settings)
    claim(msgspec.structs.replace(settings, ephemeral=False))
    with pytest.raises(DirectoryError, match="no ephemeral daemon created"):
        claim(settings)


def test_the_memory_directory_stays_only_with_memory_of_a_guest(path: Path) -> None:
    settings = made(path, "a")
    with claimed(settings):
        assert memory_dir(settings).is_dir()
    assert not memory_dir(settings).exists()
    with claimed(settings):
        (memory_dir(settings) / "1.mem").touch()
    assert (memory_dir(settings) / "1.mem").exists()


def test_the_memory_directory_of_the_next_ephemeral_daemon_stays(path: Path) -> None:
    settings = made(path, "a", ephemeral=True)
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(claimed(settings))
        remove(settings)
        # The lock files are gone, so the next one need not wait for the end of this one.
        second.enter_context(claimed(settings))
        first.close()
        assert memory_dir(settings).is_dir()


def test_a_lock_that_was_removed_meanwhile_is_none(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = made(path, "a")
    flock = fcntl.flock

    def late(fd: int, operation: int) -> None:
        # An ephemeral daemon removes it at its end.
        (settings.state_dir / "lock").unlink()
        flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(DirectoryError, match="has just removed"):
        claim(settings)


def test_foreign_files_are_kept_at_the_end(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = made(path, "a", ephemeral=True, runtime_dir=path / "as" / "run")
    with claimed(settings):
        (settings.state_dir / "volant.db").touch()
        (settings.state_dir / "volant-before-7.db-wal").touch()
        (settings.state_dir / "thesis.txt").write_text("years of work")
        remove(settings)
    assert [each.name for each in settings.state_dir.iterdir()] == ["thesis.txt"]
    assert f"{settings.state_dir} is kept, as it contains thesis.txt" in caplog.text
