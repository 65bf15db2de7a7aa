"""Stock images: Debian's packages become an OCI image in which dpkg and apt work."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from volant.images import STOCK, ImageError, build_stock
from volant.images._dpkg_tree import Tree, in_order
from volant.images._oci_archive import write_archive
from volant.images._stock import _is_omitted

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg is not installed")


def deb(folder: Path, name: str, files: dict[str, str], fields: str = "", **control: str) -> Path:
    """Builds a package."""
    root = folder / name
    sums = ""
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if text.startswith("-> "):
            target.symlink_to(text[3:])
        else:
            target.write_text(text)
            sums += f"{hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()}  {path}\n"
    (root / "DEBIAN").mkdir(parents=True)
    stanza = f"Package: {name}\nVersion: 1\nArchitecture: amd64\nMaintainer: nobody <a@b>\n{fields}Description: x\n"
    (root / "DEBIAN/control").write_text(stanza)
    for file, text in {"md5sums": sums, **control}.items():
        (root / "DEBIAN" / file).write_text(text)
        (root / "DEBIAN" / file).chmod(0o755)
    done = folder / f"{name}.deb"
    subprocess.run(["dpkg-deb", "--build", "--root-owner-group", root, done], check=True, capture_output=True)
    return done


def unpack(folder: Path, debs: list[Path]) -> Path:
    """Makes a layer of packages and extracts it."""
    with tarfile.open(folder / "layer.tar", "w") as out:
        tree = Tree(out, wanted=lambda path: path.startswith("etc/"), omitted=lambda path: "/man/" in path)
        for each in debs:
            tree.unpack(each)
        tree.finish()
    root = folder / "made"
    with tarfile.open(folder / "layer.tar") as archive:
        names = archive.getnames()
        archive.extractall(root, filter="tar")
    assert len(names) == len(set(names)), "a path is written twice"
    return root


@needs_dpkg
@pytest.mark.programs
def test_packages_are_installed_for_dpkg(tmp_path: Path) -> None:
    base = deb(tmp_path, "base", {"usr/bin/.keep": "", "bin": "-> usr/bin", "etc/base.conf": "a=1\n"},
               conffiles="/etc/base.conf\n", triggers="interest ldconfig\ninterest-noawait /usr/lib\n")  # fmt: skip
    tool = deb(tmp_path, "tool", {"usr/bin/tool": "#!/bin/sh\n", "usr/share/man/man1/tool.1": "x"},
               "Multi-Arch: same\nDepends: base\n", postinst="#!/bin/sh\nexit 0\n")  # fmt: skip
    root = unpack(tmp_path, [base, tool])
    assert (root / "bin/tool").read_text() == "#!/bin/sh\n"
    assert not (root / "usr/share/man/man1/tool.1").exists()
    database = root / "var/lib/dpkg"
    assert "/usr/bin/tool" in (database / "info/tool:amd64.list").read_text().splitlines()
    assert os.access(database / "info/tool:amd64.postinst", os.X_OK)
    assert (database / "triggers/ldconfig").read_text() == "base\n"
    assert (database / "triggers/File").read_text() == "/usr/lib base/noawait\n"
    command = ["dpkg-query", f"--admindir={database}", "-W", "-f", "${Package} ${db:Status-Status} ${Conffiles}\n"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\n")
    assert shown == ["base installed  /etc/base.conf d5e29449b9e66d5b4bb0d6ce48fbbcb1", "tool installed ", ""]
    audited = subprocess.run(["dpkg", f"--admindir={database}", "--audit"], check=True, capture_output=True, text=True)
    assert audited.stdout == ""


@needs_dpkg
@pytest.mark.programs
def test_the_first_package_decides_about_a_path(tmp_path: Path) -> None:
    one = deb(tmp_path, "one", {"etc/same": "one"})
    two = deb(tmp_path, "two", {"etc/same": "two"})
    debs = in_order({"one": one, "two": two}, ["two", "missing"])
    assert debs == [two, one]
    assert (unpack(tmp_path, debs) / "etc/same").read_text() == "two"


def test_documentation_is_left_out_and_licences_stay() -> None:
    left_out = ["usr/share/doc/a/README", "usr/share/doc/a/b/copyright", "usr/share/man/man1/a.1", "usr/share/locale/x"]
    assert all(map(_is_omitted, left_out))
    assert not any(map(_is_omitted, ["usr/share/doc/", "usr/share/doc/a", "usr/share/doc/a/copyright", "usr/bin/man"]))
    assert _is_omitted("usr/lib/python3.13/EXTERNALLY-MANAGED"), "pip would refuse to install"


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


@pytest.mark.full
@pytest.mark.system
@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root extracts owners and changes its root directory")
def test_debian_works_in_its_image(tmp_path: Path) -> None:
    """Reads and checks the database with the image's own programs, and configures a package again."""
    archive, root = tmp_path / "debian.tar", tmp_path / "root"
    cache = tmp_path / "cache"
    command = [sys.executable, "-m", "volant.images", "stock", "debian", "--output", str(archive)]
    command += ["--cache", str(cache)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    built = json.loads(done.stdout)["stock"]
    assert built["reference"] == "localhost/debian:13"
    again = build_stock("debian", tmp_path / "again.tar", cache, offline=True)
    assert again.digest == built["digest"], "the same packages make the same image"
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
