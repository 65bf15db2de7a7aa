"""Packages come from the Debian archive by mmdebstrap, or from the last build, and each failure says what to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from volant.images import Archive, ImageError, Package, Progress, _sources, build, extract_packages, obstacle

M = "http://mirror.example/debian"
LINES = ["deb http://mirror.example/debian trixie main", "deb http://mirror.example/debian trixie-updates main"]

needs_mmdebstrap = pytest.mark.skipif(
    shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed: .ci/system-packages images"
)
Stub = Callable[[str], None]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Puts a program in the place of mmdebstrap; returns a function that says what it does."""
    program = tmp_path / "bin" / "mmdebstrap"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setattr("volant.images._sources.KEYRINGS", [Path(__file__)])
    # Its hooks take the packages out of the tree.
    hooks = (
        'for each in "$@"; do case $each in *"=sync-out "*) mkdir "${each##* }"; touch "${each##* }/a_1%3a2_all.deb"'
    )

    def write(script: str) -> None:
        program.write_text(f"#!/bin/sh\nset -e\n{script}\n{hooks};; esac done\n")
        program.chmod(0o755)

    return write


def say(*said: str) -> str:
    return f"cat >&2 <<'END'\n{chr(10).join(said)}\nEND\n"


def fail(*said: str) -> str:
    return say(*said, "E: command failed: eval", "E: mmdebstrap failed to run") + "exit 1\n"


def extract(cache: Path, tell: Callable[[Progress], None] = lambda progress: None, **source: Any) -> list[Package]:
    return extract_packages(cache, ["a"], cache.with_name("tree"), archive=Archive(**source), progress=tell)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("untrusted", "E: The repository 'http://m.example/debian trixie InRelease' is not signed."),
        ("untrusted", "E: Failed to fetch http://m.example/a.deb  Hash Sum mismatch"),
        ("unreachable", "E: Failed to fetch http://m.example/InRelease  Could not resolve 'm.example'"),
        ("unreachable", "E: The repository 'http://m.example trixie Release' does not have a Release file."),
        ("unresolved", "E: Unable to locate package a"),
        ("unresolved", "E: Unable to correct problems, you have held broken packages."),
        ("no_namespaces", "E: unable to pick chroot mode automatically (use --mode for manual selection)"),
        ("cache_full", "tar: ./usr/bin/a: Cannot write: No space left on device"),
        ("build_failed", "dpkg: error: a surprise"),
    ],
)
def test_a_failure_has_a_code_and_says_what_to_do(tmp_path: Path, stub: Stub, code: str, said: str) -> None:
    stub(fail("I: running apt-get update...", said))
    with pytest.raises(ImageError) as caught:
        extract(tmp_path / "cache")
    assert caught.value.code == code
    assert " ".join(said.removeprefix("E:").split()) in caught.value.message
    assert "command failed" not in caught.value.message
    assert caught.value.hint or code == "build_failed"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"], "something is left"


def test_a_host_without_mmdebstrap_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ImageError) as caught:
        build(tmp_path / "cache")
    for error in (caught.value, obstacle()):
        assert error is not None
        assert (error.code, "install the package mmdebstrap" in error.hint) == ("no_mmdebstrap", True)


def test_a_missing_keyring_is_an_error(tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    stub("")
    with pytest.raises(ImageError) as caught:
        extract(tmp_path / "cache", keyring=tmp_path / "none")
    assert caught.value.code == "no_keyring"
    monkeypatch.setattr("volant.images._sources.KEYRINGS", [tmp_path / "none"])
    with pytest.raises(ImageError) as caught:
        extract(tmp_path / "cache")
    assert "debian-archive-keyring" in caught.value.hint


def test_progress_counts_the_bytes_that_arrive(tmp_path: Path, stub: Stub) -> None:
    first = ["Get:1 http://m.example trixie Packages [9 kB]", "Need to get 3,000 kB of archives."]
    archives = ["Get:1 http://m.example a amd64 1 [1000 kB]", "Get:2 http://m.example b amd64 1 [2000 kB]"]
    last = [
        "I: extracting archives...",
        "Need to get 0 B/7 MB of archives.",
        "Setting up a (1) ...",
        "Setting up b ...",
    ]
    stub(say(*first, *archives, *last))
    seen: list[Progress] = []
    extract(tmp_path / "cache", seen.append, mirror=M)
    download = [("download", done, 3_000_000) for done in (0, 0, 1_000_000)]
    others = [(name, 0, 0) for name in ("update", "unpack", "download", "install")]
    assert [(each.phase, each.done, each.total) for each in seen] == [others[0], *download, *others[1:]]


def test_the_packages_of_the_last_build_replace_a_mirror_that_does_not_answer(tmp_path: Path, stub: Stub) -> None:
    cache = tmp_path / "cache"
    stub("")
    first = extract(cache, mirror=M)
    assert [(each.name, each.version, each.architecture) for each in first] == [("a", "1:2", "all")]
    arguments = tmp_path / "arguments"
    # Only the second run is without the network, and it asks for what is in the cache.
    failed = fail("E: Failed to fetch http://m.example/")
    stub(f'if [ -z "$OFFLINE" ]; then\n{failed}fi\nprintf "%s\\n" "$@" >{arguments}')
    said: list[str] = []
    again = extract(cache, lambda progress: said.append(progress.message), mirror="http://other.example")
    assert again == first
    assert any("can't be reached" in text and "the last build" in text for text in said), said
    assert arguments.read_text().splitlines()[-2:] == LINES
    # Not for one that is not trusted, nor if other keys have signed them.
    stub(fail("E: The repository 'http://other.example trixie InRelease' is not signed."))
    with pytest.raises(ImageError) as caught:
        extract(cache)
    assert caught.value.code == "untrusted"
    seen = tmp_path / "seen"
    stub(f'ls "$WORK/packages/archives" >{seen}\n{failed}')
    with pytest.raises(ImageError) as caught:
        extract(cache, keyring=seen.with_name("bin") / "mmdebstrap")
    assert (caught.value.code, seen.read_text()) == ("unreachable", "")


def test_a_package_that_has_changed_is_not_used(tmp_path: Path, stub: Stub) -> None:
    cache = tmp_path / "cache"
    stub("")
    extract(cache)
    (deb,) = (cache / "packages/archives").iterdir()
    deb.write_text("changed")
    with pytest.raises(ImageError) as caught:
        extract(cache, offline=True)
    assert (caught.value.code, caught.value.message) == ("offline", "The cache lacks a")
    seen = tmp_path / "seen"
    stub(f'ls "$WORK/packages/archives" >{seen}')
    extract(cache)
    assert seen.read_text() == ""
    # Nor is the network asked for one that the last build did not have.
    stub(fail("E: Unable to fetch some archives, maybe run apt-get update or try with --fix-missing?"))
    with pytest.raises(ImageError) as caught:
        extract(cache, offline=True)
    assert (caught.value.code, "without --offline" in caught.value.hint) == ("offline", True)


def test_a_mirror_can_be_named() -> None:
    security = f"{M}-security"
    assert _sources.explicit_sources(M, None) == LINES
    assert _sources.explicit_sources(M, security) == [*LINES, f"deb {security} trixie-security main"]
    assert _sources.explicit_sources("file:/srv/debian", None)[0] == "deb copy:/srv/debian trixie main"
    for bad in ("debian.example", "http://x y/", 'http://x"/', "ftp://x/"):
        with pytest.raises(ImageError) as caught:
            _sources.explicit_sources(bad, None)
        assert caught.value.code == "bad_mirror"
        assert caught.value.hint


@needs_mmdebstrap
@pytest.mark.programs
def test_of_the_hosts_apt_only_debians_mirrors_and_the_settings_of_the_network_are_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert (_sources.host_sources(), _sources.transport_settings()) == ([], ""), "a host without apt has neither"
    monkeypatch.undo()
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    used = ["""Acquire::http::Proxy "http://user:word@proxy.example:3128";""", """Acquire::https::CaInfo "/own.pem";"""]
    (tmp_path / "apt.conf").write_text(f"""
        Dir::Etc::SourceList "{tmp_path}/sources.list"; Dir::Etc::SourceParts "/dev/null"; Dir::Etc::Main "/dev/null";
        Dir::Etc::Parts "/dev/null"; Dir::State::Lists "{tmp_path}"; APT::Default-Release "sid"; {" ".join(used)}
        Acquire::AllowInsecureRepositories "1"; DPkg::Post-Invoke {{ "rm -rf /"; }}; Dir::Bin::gpg "/bin/true";
    """)
    lines = ["deb [trusted=yes] file:/srv ./"]
    for suite, address, origin in (
        *((f"bookworm{part}", M, "Debian") for part in ("", "-updates", "-backports")),
        ("bookworm-security", f"{M}-security", "Debian"),
        ("stable", "http://vendor.example/debian", "Vendor"),
    ):
        lines += [f"deb {address} {suite} main contrib", f"deb-src {address} {suite} main"]
        stem = tmp_path / f"{address.removeprefix('http://').replace('/', '_')}_dists_{suite}"
        Path(f"{stem}_Release").write_text(
            f"Origin: {origin}\nCodename: {suite}\nDate: Sat, 01 Jan 2025 00:00:00 UTC\nSHA256:\n"
            + "".join(f" {'0' * 64} 0 {part}/binary-amd64/Packages\n" for part in ("main", "contrib"))
        )
        for part in ("main", "contrib"):
            Path(f"{stem}_{part}_binary-amd64_Packages").touch()
    (tmp_path / "sources.list").write_text("\n".join(lines))
    security = f"deb {M}-security/ trixie-security main"
    debian = [f"deb {M}/ trixie main", f"deb {M}/ trixie-updates main", security]
    assert _sources.host_sources() == debian
    assert _sources.transport_settings().split("\n") == [
        'Acquire::http "";',
        used[0],
        'Acquire::https "";',
        used[1],
        "",
    ]
    for index in tmp_path.glob("*_dists_*"):
        index.unlink()
    assert _sources.host_sources() == debian, "a host that has fetched no index uses other mirrors"


@pytest.mark.system
@pytest.mark.slow
@needs_mmdebstrap
def test_a_tree_has_only_files_of_packages_that_trusted_keys_have_signed(tmp_path: Path) -> None:
    cache, tree = tmp_path / "cache", tmp_path / "tree"
    (wrong,) = Path("/usr/share/keyrings").glob("debian-archive-removed-keys.gpg")
    with pytest.raises(ImageError) as caught:
        extract_packages(cache, ["netbase"], tree, archive=Archive(keyring=wrong))
    assert caught.value.code == "untrusted"
    assert [path.name for path in cache.iterdir()] == ["lock"]
    with pytest.raises(ImageError) as caught:
        extract_packages(cache, ["no-such-package"], tmp_path / "other")
    assert caught.value.code == "unresolved"
    shutil.rmtree(tree)
    python = [each.name for each in extract_packages(cache, ["python3-h11"], tree, without=["python3"])]
    assert python == ["python3-h11"], "dependencies of the packages to leave out came along"
    files = {str(path.relative_to(tree)) for path in tree.rglob("*") if not path.is_dir()}
    assert files
    assert all(file.startswith(("usr/lib/python3/", "usr/share/doc/python3-h11/")) for file in files), files


@pytest.mark.system
@pytest.mark.slow
@needs_mmdebstrap
def test_the_next_build_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """With `kill -9` of the whole process group, in the middle of the work."""
    build = [sys.executable, "-m", "volant.images", "build", "--cache", str(tmp_path), "--json-progress"]
    process = subprocess.Popen(build, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if '"unpack"' in line:
            break
    subprocess.run(["kill", "-9", "--", f"-{process.pid}"], check=True)
    process.communicate()
    assert list(tmp_path.glob("build-*"))
    with pytest.raises(ImageError):
        extract_packages(tmp_path, ["a"], tmp_path / "tree", archive=Archive(offline=True))
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
