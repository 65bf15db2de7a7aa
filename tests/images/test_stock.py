"""Stock images: Debian's packages become an OCI image in which dpkg and apt work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from volant.images import STOCK, ImageError, build_stock
from volant.images._oci_archive import write_archive

ROOT = Path(__file__).parents[2]
USER = 65534
_AS_USER = f"""
for each in /etc/subuid /etc/subgid; do mount --bind "$0" $each; done
exec setpriv --reuid={USER} --regid={USER} --clear-groups env -i HOME=/nonexistent \
    PATH="$PATH" PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1 TZ=Asia/Kathmandu sh -c 'umask 077 && exec "$@"' sh "$@"
"""

needs_users = pytest.mark.skipif(
    os.geteuid() != 0
    or not all(map(shutil.which, ("mmdebstrap", "newuidmap")))
    or not Path("/etc/subuid").exists()
    or not all(place.stat().st_mode & 1 for path in (ROOT, Path(sys.executable)) for place in (path, *path.parents)),
    reason="only root becomes an ordinary user, who needs mmdebstrap, newuidmap, and to read this repository",
)


def owned(folder: Path) -> Path:
    """Makes a folder, which everybody reaches, that of an ordinary user."""
    folder.mkdir()
    os.chown(folder, USER, USER)
    for parent in folder.parents:
        if parent.stat().st_mode & 0o011 != 0o011:
            parent.chmod(parent.stat().st_mode | 0o011)
    return folder


def as_user(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Runs a command as the ordinary user, who has subordinate IDs."""
    ids = tmp_path / "ids"
    ids.write_text(f"{USER}:100000:65536\n")
    prefix = ["unshare", "--mount", "sh", "-ec", _AS_USER, str(ids)]
    return subprocess.run([*prefix, *command], check=True, capture_output=True, text=True, cwd="/", timeout=900)


def test_an_archive_has_the_image(tmp_path: Path) -> None:
    layer = tmp_path / "layer.tar"
    layer.write_bytes(b"\0" * 10240)
    digests = [write_archive(tmp_path / name, layer, {"Cmd": ["sh"]}, "localhost/x:1", 0) for name in ("a", "b")]
    assert digests[0] == digests[1]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with tarfile.open(tmp_path / "a") as archive:
        files = {member.name: archive.extractfile(member) for member in archive}
        read = {name: file.read() for name, file in files.items() if file is not None}
    [entry] = json.loads(read["index.json"])["manifests"]
    assert entry["digest"] == digests[0]
    manifest = json.loads(read[f"blobs/sha256/{digests[0][7:]}"])
    config = json.loads(read[f"blobs/sha256/{manifest['config']['digest'][7:]}"])
    assert (config["config"], config["created"]) == ({"Cmd": ["sh"]}, "1970-01-01T00:00:00Z")
    assert config["rootfs"]["diff_ids"] == [manifest["layers"][0]["digest"]]


def test_an_unknown_stock_image_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no stock image 'ruby'") as caught:
        build_stock("ruby", tmp_path / "x", tmp_path)
    assert all(name in caught.value.hint for name in STOCK)


@pytest.mark.programs
@needs_users
def test_the_next_build_removes_what_a_killed_one_of_a_user_left(tmp_path: Path) -> None:
    """Some of its files are owned by subordinate IDs of the user, who alone can't remove them."""
    mine = owned(tmp_path / "mine")
    script = """cd "$0" && mkdir -p cache/build-killed elsewhere && chmod 777 elsewhere
        ln -s "$0/elsewhere" cache/build-killed/work
        mmdebstrap --unshare-helper install -d -m 700 -o 42 "$0/elsewhere/left" "$0/elsewhere/left/deep"
        chmod 711 elsewhere"""
    as_user(tmp_path, "sh", "-ec", script, str(mine))
    assert (mine / "elsewhere/left").stat().st_uid == 100042
    prune = "import sys; from pathlib import Path; from volant.images import prune; prune(Path(sys.argv[1]), [])"
    as_user(tmp_path, sys.executable, "-c", prune, str(mine / "cache"))
    assert [path.name for path in mine.rglob("*")] == ["cache", "lock"]


@pytest.mark.full
@pytest.mark.system
@pytest.mark.slow
@needs_users
def test_debian_works_in_its_image(tmp_path: Path) -> None:
    """Reads and checks the database with the image's own programs, and configures a package again."""
    archive, root = tmp_path / "debian.tar", tmp_path / "root"
    mine = owned(tmp_path / "mine")
    cache = tmp_path / "cache"
    stock = [sys.executable, "-m", "volant.images", "stock", "debian", "--cache", str(cache), "--output"]
    done = subprocess.run([*stock, str(archive)], check=True, capture_output=True, text=True)
    built = json.loads(done.stdout)["stock"]
    assert built["reference"] == "localhost/debian:13"
    before = set(Path("/var/tmp").iterdir())
    shutil.copytree(cache, mine / "cache")
    subprocess.run(["chown", "-R", str(USER), str(mine)], check=True)
    again = as_user(
        tmp_path, *(word.replace(str(cache), f"{mine}/cache") for word in stock), f"{mine}/tar", "--offline"
    )
    assert json.loads(again.stdout)["stock"] == built, "the same packages make the same image, for any user"
    for folder in (cache, mine / "cache"):
        assert {path.name for path in folder.rglob("*") if path.is_dir()} == {"debian", "packages", "archives", "lists"}
    assert set(Path("/var/tmp").iterdir()) == before
    with tarfile.open(archive) as outer:
        largest = max(outer, key=lambda member: member.size)
        layer = outer.extractfile(largest)
        assert layer is not None
        with tarfile.open(fileobj=layer) as inner:
            inner.extractall(root, filter="fully_trusted")

    def inside(*words: str) -> str:
        environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
        words = ("chroot", str(root), *words)
        return subprocess.run(words, env=environ, check=True, capture_output=True, text=True, timeout=60).stdout

    assert inside("dpkg", "--audit") == ""
    assert inside("dpkg", "--configure", "--pending") == "", "a trigger waits"
    inside("apt-get", "-q", "check")
    assert "uid=42(_apt)" in inside("id", "_apt")
    inside("useradd", "-m", "-s", "/bin/bash", "tester")
    assert inside("su", "-", "tester", "-c", "id -un; pwd").split() == ["tester", "/home/tester"]
    for package in ("base-files", "libc-bin", "mawk", "ca-certificates"):
        inside("dpkg-reconfigure", package)
    assert inside("dpkg", "--audit") == ""
    assert (root / "etc/ssl/certs/ca-certificates.crt").read_text().count("BEGIN CERTIFICATE") > 50
    documents = {path.name for path in (root / "usr/share/doc").rglob("*") if path.is_file()}
    assert documents == {"copyright"}, "documentation is left out, and licences stay"
    assert not list((root / "usr/share/man").rglob("*.gz"))
    host = {"etc/hostname", "etc/resolv.conf", "etc/apt/apt.conf.d/99mmdebstrap", "volant"}
    assert not [name for name in host if (root / name).exists()], "something of this host is in the image"
