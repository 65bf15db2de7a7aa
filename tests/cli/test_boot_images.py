"""`volar boot-images`: boot artifacts are fetched, listed and removed without a daemon, and what can't be is said."""

from __future__ import annotations

import fcntl
import hashlib
import json
import struct
from pathlib import Path

import pytest

from .kit import volar

DATA = b"a kernel, or so"
DIGEST = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "kernel").write_bytes(DATA)
    return {"VOLANT_CACHE_DIR": str(tmp_path / "cache")}


async def test_an_artifact_is_fetched_listed_and_removed(environ: dict[str, str], tmp_path: Path) -> None:
    fetched = await volar(None, "boot-images", "fetch", str(tmp_path / "kernel"), DIGEST, "--json", environ=environ)
    assert json.loads(fetched.out)["digest"] == DIGEST
    listed = await volar(None, "boot-images", "artifacts", environ=environ)
    title, row = listed.out.decode().splitlines()
    assert title.split() == ["ARTIFACT", "SIZE", "ON", "DISK", "FROM"]
    assert row.split()[0] == DIGEST[:12]
    removed = await volar(None, "boot-images", "delete", DIGEST[:8], environ=environ)
    assert removed.code == 0
    assert json.loads((await volar(None, "boot-images", "artifacts", "--json", environ=environ)).out) == []


async def test_an_artifact_that_a_vm_uses_stays_and_that_is_reported(environ: dict[str, str], tmp_path: Path) -> None:
    assert (await volar(None, "boot-images", "fetch", str(tmp_path / "kernel"), DIGEST, environ=environ)).code == 0
    with (tmp_path / "cache/artifacts" / DIGEST).open("rb") as file:
        # As QEMU does: a shared lock on some byte, of the open file.
        fcntl.fcntl(file, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 100, 1, 0))
        kept = await volar(None, "boot-images", "delete", DIGEST[:8], environ=environ)
    assert (kept.code, kept.out) == (1, b"")
    assert f"a VM runs on {DIGEST[:12]}, which stays" in kept.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ("fetch", "{}/kernel", "0" * 64),
            1,
            ("/kernel: there is no file that may be read and has this SHA-256", "correct the manifest"),
        ),
        (("fetch", "{}/kernel", DIGEST.upper()), 2, ("SHA256", "lower case")),
        (("fetch", "kernel", DIGEST), 2, ("URL", "absolute path")),
        (("fetch", "{}/none", DIGEST), 1, ("no file that may be read",)),
        (("delete", "abc"), 1, ("begins with abc", "boot-images artifacts")),
    ],
)
async def test_errors_are_reported(
    environ: dict[str, str], tmp_path: Path, arguments: tuple[str, ...], code: int, words: tuple[str, ...]
) -> None:
    done = await volar(None, "boot-images", *(argument.format(tmp_path) for argument in arguments), environ=environ)
    assert done.code == code
    assert all(word in done.err for word in words), done.err
