"""Same packages, same bytes, for any user, place and settings."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from volant.images import Archive, Image, build, find, list_images

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.system, pytest.mark.slow]


def digests(image: Image) -> dict[str, str]:
    folder = image.kernel.parent
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def open_to_others(path: Path) -> bool:
    """Whether any user can reach a path; an interpreter may be in root's home."""
    return all(place.stat().st_mode & 0o001 for place in (path, *path.parents))


def nothing_of_this_machine(image: Image, *places: str) -> None:
    """Fails if a path, a mirror or the host's name is in an image or in its record."""
    data, record = image.initramfs.read_bytes(), (image.kernel.parent / "image.json").read_bytes()
    secrets = [*places, str(ROOT), "/etc/apt"]
    if len(os.uname().nodename) > 6:  # a short one is found in any ten megabytes
        secrets.append(os.uname().nodename)
    for secret in secrets:
        assert secret.encode() not in record
        assert secret.encode() not in data
    assert b"http" not in record


def test_two_builds_are_the_same_bytes(tmp_path: Path) -> None:
    first_cache = tmp_path / "first"
    phases: list[str] = []
    first = build(first_cache, progress=lambda progress: phases.append(progress.phase))
    assert find(first_cache) == first
    assert phases[-1] == "done"
    assert phases.index("download") < phases.index("compile")
    nothing_of_this_machine(first, str(tmp_path))
    packages = json.loads((first.kernel.parent / "image.json").read_bytes())["packages"]
    assert {row["name"] for row in packages} >= {"busybox-static", "python3-h2", "python3.13-minimal"}
    assert all(len(row["sha256"]) == 64 for row in packages)

    # Another place, another user if possible, other settings, no network.
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.stat().st_uid == os.geteuid() and parent.stat().st_mode & 0o077 == 0:
            parent.chmod(parent.stat().st_mode | 0o011)
    second_cache = tmp_path / "another folder" / "with a longer name"
    second_cache.mkdir(parents=True)
    shutil.copytree(first_cache / "packages", second_cache / "packages")
    user = None
    if os.geteuid() == 0 and all(map(open_to_others, (Path(sys.executable).resolve(), ROOT))):
        for path in [second_cache, *second_cache.rglob("*")]:
            os.chown(path, 65534, 65534)
        user = 65534
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "77",
        "TZ": "Asia/Kathmandu",
        "LC_ALL": "C",
        "HOME": "/nonexistent",
    }
    done = subprocess.run(
        [sys.executable, "-m", "volant.images", "build", "--cache", str(second_cache), "--offline", "--json-progress"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd="/",
        user=user,
        group=user,
        umask=0o077,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["image"]["digest"] == first.digest
    second = find(second_cache)
    assert second is not None
    assert second.digest == first.digest
    assert digests(second) == digests(first)

    # A third build finds the image and changes nothing.
    before = second.kernel.stat()
    assert build(first_cache, archive=Archive(offline=True)) == first
    assert second.kernel.stat().st_mtime == before.st_mtime
    assert [image.digest for image in list_images(first_cache)] == [first.digest]
    assert not list(first_cache.glob("build-*"))

    # Nor does one whose mirror can't be reached.
    said: list[str] = []
    unreachable = Archive("http://127.0.0.1:9/debian")
    assert build(first_cache, archive=unreachable, progress=lambda progress: said.append(progress.message)) == first
    assert any("can't be reached" in text for text in said), said
