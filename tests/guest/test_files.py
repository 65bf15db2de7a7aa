"""Files: read, written and deleted, singly or as tar; nothing gets out of its directory."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import socket
import stat
import tarfile
import time
from pathlib import Path

import pytest

from tests.guest.conftest import Answer, Asker, read_all
from volant.guest import _file_io, _files, _http, _stream

TAR = "Content-Type: application/x-tar\r\n"
ME = f"{os.getuid()}:{os.getgid()}"


def url(path: Path | str, query: str = "") -> str:
    return f"/v1/files{path}{query}"


def tar_of(*members: tuple[str, object], **fields: object) -> bytes:
    """Returns a tar. A member is a name and its bytes, or a type and the target of a link; None: a directory."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, what in members:
            member = tarfile.TarInfo(name)
            member.uid, member.gid = os.getuid(), os.getgid()
            member.mode = 0o644
            content = None
            if what is None:
                member.type, member.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(what, bytes):
                member.size, content = len(what), io.BytesIO(what)
            else:
                assert isinstance(what, tuple)
                member.type, member.linkname = what
            for field, value in fields.items():
                setattr(member, field, value)
            archive.addfile(member, content)
    return out.getvalue()


def problem(answer: Answer, status: int, *words: str) -> None:
    assert answer.status == status, answer.body
    assert answer.headers["content-type"] == "application/problem+json"
    for word in words:
        assert word in answer.json()["detail"]


# Files


def test_a_file_comes_back_as_it_was_written(agent: Asker, tmp_path: Path) -> None:
    data = os.urandom(700_000)
    answer = agent.ask("PUT", url(tmp_path / "a"), data)
    assert answer.status == 201
    assert (tmp_path / "a").read_bytes() == data
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o644
    found = agent.ask("GET", url(tmp_path / "a"))
    assert found.status == 200
    assert found.body == data
    assert found.headers["content-length"] == str(len(data))
    assert found.headers["etag"] == answer.headers["etag"]
    assert found.headers["volant-file-mode"] == "0644"
    head = agent.raw(b"HEAD %b HTTP/1.1\r\nHost: a\r\n\r\n" % url(tmp_path / "a").encode())
    assert b"content-length: 700000" in head.lower()
    assert head.endswith(b"\r\n\r\n")


def test_an_upload_in_chunks(agent: Asker, tmp_path: Path) -> None:
    head = f"PUT {url(tmp_path / 'c')} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer = Answer(agent.raw(head.encode() + b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"))
    assert answer.status == 201
    assert (tmp_path / "c").read_bytes() == b"hello world"
    broken = Answer(agent.raw(head.encode() + b"5\r\nhelloXX\r\n"))
    problem(broken, 400, "malformed")
    assert (tmp_path / "c").read_bytes() == b"hello world"
    assert os.listdir(tmp_path) == ["c"]  # noqa: PTH208


def test_mode_and_owner_are_set_or_kept(agent: Asker, tmp_path: Path) -> None:
    path = tmp_path / "x"
    assert agent.ask("PUT", url(path, f"?mode=4750&user={ME}"), b"1").status == 201
    assert stat.S_IMODE(path.stat().st_mode) == 0o4750
    assert agent.ask("PUT", url(path), b"2").status == 204
    assert stat.S_IMODE(path.stat().st_mode) == 0o4750
    for query, field in (("?mode=8", "mode"), ("?mode=77777", "mode"), ("?mode=", "mode"), ("?user=no-one", "user"),
                         ("?owner=1", "owner"), ("?mode=1&mode=2", "mode")):  # fmt: skip
        answer = agent.ask("PUT", url(path, query), b"3")
        problem(answer, 400)
        assert answer.json()["field"] == field
    assert path.read_bytes() == b"2"


def test_an_upload_that_breaks_off_keeps_the_old_file(agent: Asker, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"before")
    for name in ("x", "new"):
        sock = agent.open(f"PUT {url(tmp_path / name)} HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n".encode())
        sock.sendall(bytes(50000))
        until(lambda: any(".volant-" in found for found in os.listdir(tmp_path)))  # noqa: PTH208
        sock.close()
        until(lambda: os.listdir(tmp_path) == ["x"])  # noqa: PTH208
    assert path.read_bytes() == b"before"


def until(done: object) -> None:
    assert callable(done)
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_client_that_sends_nothing_gets_a_408(agent: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "SILENCE_S", 0.05)
    sock = agent.open(f"PUT {url(tmp_path / 'x')} HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n".encode())
    problem(Answer(read_all(sock)), 408)
    assert not list(tmp_path.iterdir())


def test_a_reader_that_leaves_frees_the_agent(agent: Asker, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(5_000_000))
    sock = agent.open(f"GET {url(tmp_path / 'big')} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
    sock.recv(1000)
    sock.close()
    until(lambda: agent.server.statistics()["streams"] == 0)


def test_links_are_followed_when_read_and_written_and_not_when_deleted(agent: Asker, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"1")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("made")
    assert agent.ask("GET", url(tmp_path / "link")).body == b"1"
    assert agent.ask("PUT", url(tmp_path / "link"), b"2").status == 204
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"2"
    assert agent.ask("PUT", url(tmp_path / "dangling"), b"3").status == 201
    assert (tmp_path / "made").read_bytes() == b"3"
    assert agent.ask("DELETE", url(tmp_path / "link")).status == 204
    assert (tmp_path / "real").exists()
    (tmp_path / "loop").symlink_to("loop")
    problem(agent.ask("GET", url(tmp_path / "loop")), 409, "symbolic links")


@pytest.mark.parametrize(
    ("asked", "status", "body", "said"),
    [
        ("bytes=0-4", 206, b"01234", "bytes 0-4/10"),
        ("bytes=7-", 206, b"789", "bytes 7-9/10"),
        ("bytes=-2", 206, b"89", "bytes 8-9/10"),
        ("bytes=-20", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=8-100", 206, b"89", "bytes 8-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=-0", 416, None, "bytes */10"),
        ("bytes=0-1,3-4", 200, b"0123456789", None),
        ("bytes=5-3", 200, b"0123456789", None),
        ("lines=0-1", 200, b"0123456789", None),
    ],
)
def test_ranges(agent: Asker, tmp_path: Path, asked: str, status: int, body: bytes | None, said: str | None) -> None:
    (tmp_path / "r").write_bytes(b"0123456789")
    answer = agent.ask("GET", url(tmp_path / "r"), headers=f"Range: {asked}\r\n")
    assert answer.status == status
    assert answer.headers.get("content-range") == said
    if body is not None:
        assert answer.body == body


def test_a_range_of_another_version_returns_the_whole_file(agent: Asker, tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(b"0123456789")
    tag = agent.ask("GET", url(tmp_path / "r")).headers["etag"]
    assert agent.ask("GET", url(tmp_path / "r"), headers=f"If-None-Match: {tag}\r\n").status == 304
    same = agent.ask("GET", url(tmp_path / "r"), headers=f"Range: bytes=5-\r\nIf-Range: {tag}\r\n")
    assert same.body == b"56789"
    other = agent.ask("GET", url(tmp_path / "r"), headers='Range: bytes=5-\r\nIf-Range: "x"\r\n')
    assert other.status == 200
    assert other.body == b"0123456789"


def test_files_without_a_length(agent: Asker, tmp_path: Path) -> None:
    assert b"MemTotal" in agent.ask("GET", url("/proc/meminfo")).body
    (tmp_path / "empty").touch()
    answer = agent.ask("GET", url(tmp_path / "empty"))
    assert answer.whole
    assert answer.body == b""


def test_errors_name_the_path(agent: Asker, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "inner").touch()
    os.mkfifo(tmp_path / "fifo")
    problem(agent.ask("GET", url(tmp_path / "no")), 404, f"{tmp_path}/no")
    problem(agent.ask("GET", url(tmp_path / "file/below")), 404, f"{tmp_path}/file/below")
    problem(agent.ask("GET", url(tmp_path / "fifo")), 409, f"{tmp_path}/fifo")
    problem(agent.ask("PUT", url(tmp_path / "no/file"), b""), 404, f"{tmp_path}/no")
    problem(agent.ask("PUT", url(tmp_path / "dir"), b""), 409, "is a directory")
    problem(agent.ask("PUT", url(tmp_path / "fifo"), b""), 409, f"{tmp_path}/fifo")
    problem(agent.ask("PUT", url(tmp_path / "file/below"), b""), 409, "not a directory")
    problem(agent.ask("PUT", url(tmp_path / ("n" * 300)), b""), 400, "too long")
    problem(agent.ask("DELETE", url(tmp_path / "no")), 404, f"{tmp_path}/no")
    problem(agent.ask("DELETE", url(tmp_path / "dir")), 409, "not empty")
    problem(agent.ask("DELETE", url("/", "?recursive=true")), 409, "root")
    problem(agent.ask("DELETE", url(tmp_path / "dir", "?recursive=1")), 400)
    problem(agent.ask("POST", url(tmp_path / "file"), b""), 405)
    problem(agent.ask("GET", url(tmp_path / "file", "?x=1")), 400, "x")
    answer = agent.ask("PUT", url(tmp_path / "z"), b"", headers="Content-Encoding: gzip\r\n")
    problem(answer, 415)


@pytest.mark.parametrize(
    "path", ["/a/../b", "/a/%2e%2E/b", "/./a", "/a%2fb", "/a%00", "/a%", "/a%4", "/a%zz", "/%c3%2F"]
)
def test_an_ambiguous_path_is_refused(agent: Asker, path: str) -> None:
    problem(agent.ask("GET", url(path)), 400)


def test_names_are_bytes(agent: Asker, tmp_path: Path) -> None:
    name = b"caf\xe9 %20 \xf0\x9f\xa6\x8a\n"
    encoded = "".join(f"%{byte:02X}" for byte in name)
    assert agent.ask("PUT", f"/v1/files/{tmp_path}//{encoded}", b"1").status == 201
    assert os.listdir(os.fsencode(tmp_path)) == [name]  # noqa: PTH208
    assert agent.ask("GET", url(tmp_path / encoded)).body == b"1"


def test_a_full_disk_is_507_and_leaves_nothing(agent: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_file_io, "write", full)
    problem(agent.ask("PUT", url(tmp_path / "x"), b"1"), 507, f"{tmp_path}/x")
    problem(agent.ask("PUT", url(tmp_path / "d"), tar_of(("f", b"1")), headers=TAR), 507, "f")
    assert not list(tmp_path.iterdir())


def test_writing_stops_before_the_memory_is_used_up(
    agent: Asker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_file_io, "memory", lambda: {"total_mb": 87, "available_mb": 11})
    answer = agent.ask("PUT", url(tmp_path / "x"), b"1")
    problem(answer, 507, f"{tmp_path}/x")
    assert "memory" in answer.json()["hint"]
    problem(agent.ask("PUT", url(tmp_path / "d"), tar_of(("f", b"1")), headers=TAR), 507, "f")
    assert not list(tmp_path.iterdir())
    # Unknown memory refuses nothing.
    monkeypatch.setattr(_file_io, "memory", lambda: {"total_mb": 0, "available_mb": 0})
    assert agent.ask("PUT", url(tmp_path / "x"), b"1").status == 201


def test_deleting(agent: Asker, tmp_path: Path) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "f").touch()
    (tmp_path / "keep").touch()
    (tmp_path / "d" / "link").symlink_to(tmp_path / "keep")
    assert agent.ask("DELETE", url(tmp_path / "d/e/f")).status == 204
    assert agent.ask("DELETE", url(tmp_path / "d/e")).status == 204
    assert agent.ask("DELETE", url(tmp_path / "d", "?recursive=true")).status == 204
    assert os.listdir(tmp_path) == ["keep"]  # noqa: PTH208


# Directories


def test_a_tree_comes_back_as_it_was(agent: Asker, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / ("long" * 40)).mkdir(parents=True)
    (source / "deep" / ("long" * 40) / "file").write_bytes(b"x" * 1000)
    (source / "run.sh").write_bytes(b"#!/bin/sh\n")
    (source / "run.sh").chmod(0o755)
    (source / "empty").mkdir(mode=0o711)
    (source / "link").symlink_to("/etc/passwd")
    (source / os.fsdecode(b"caf\xe9")).write_bytes(b"bytes")
    (source / "ümläut").write_bytes(b"text")
    os.mkfifo(source / "fifo")
    os.utime(source / "run.sh", (1_000_000_000, 1_000_000_000))
    answer = agent.ask("GET", url(source))
    assert answer.status == 200
    assert answer.whole
    assert answer.headers["content-type"] == "application/x-tar"
    with tarfile.open(fileobj=io.BytesIO(answer.body), errors="surrogateescape", encoding="utf-8") as archive:
        assert "run.sh" in archive.getnames()
    assert agent.ask("PUT", url(tmp_path / "copy"), answer.body, headers=TAR).status == 201
    (source / "fifo").unlink()
    assert digest(tmp_path / "copy") == digest(source)
    assert (tmp_path / "copy" / "run.sh").stat().st_mtime == 1_000_000_000
    assert (tmp_path / "copy" / "link").is_symlink()


def digest(top: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in sorted(top.rglob("*")):
        mode = path.lstat().st_mode
        content = b""
        if path.is_symlink():
            content = os.fsencode(os.readlink(path))  # noqa: PTH115
        elif path.is_file():
            content = path.read_bytes()
        found[str(path.relative_to(top))] = (mode, hashlib.sha256(content).hexdigest())
    return found


def test_a_tar_is_unpacked_over_existing_files(agent: Asker, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "old").write_bytes(b"old")
    (tmp_path / "d" / "kept").write_bytes(b"kept")
    data = tar_of(
        ("./", None), ("./old", b"new"), ("sub/", None), ("sub/file", b"1"), ("hard", (tarfile.LNKTYPE, "old"))
    )
    assert agent.ask("PUT", url(tmp_path / "d"), data, headers=TAR).status == 204
    assert (tmp_path / "d" / "old").read_bytes() == b"new"
    assert (tmp_path / "d" / "kept").read_bytes() == b"kept"
    assert (tmp_path / "d" / "sub" / "file").read_bytes() == b"1"
    assert (tmp_path / "d" / "hard").samefile(tmp_path / "d" / "old")
    # Again: a hard link onto itself leaves no temporary file.
    assert agent.ask("PUT", url(tmp_path / "d"), data, headers=TAR).status == 204
    assert sorted(os.listdir(tmp_path / "d")) == ["hard", "kept", "old", "sub"]  # noqa: PTH208
    problem(agent.ask("PUT", url(tmp_path / "d" / "old"), data, headers=TAR), 409, "not a directory")
    problem(agent.ask("PUT", url(tmp_path / "d", "?mode=644"), data, headers=TAR), 400)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (tar_of(("../out", b"1")), 400),
        (tar_of(("a/../../out", b"1")), 400),
        (tar_of(("link", (tarfile.SYMTYPE, "../outside")), ("link/out", b"1")), 409),
        (tar_of(("link", (tarfile.SYMTYPE, "/")), ("link/tmp/out", b"1")), 409),
        (tar_of(("there/out", b"1")), 409),
        (tar_of(("hard", (tarfile.LNKTYPE, "../outside/secret"))), 400),
        (tar_of(("hard", (tarfile.LNKTYPE, "there/secret"))), 409),
        (tar_of(("null", (tarfile.CHRTYPE, ""))), 400),
        (tar_of(("block", (tarfile.BLKTYPE, ""))), 400),
        (tar_of(("fifo", (tarfile.FIFOTYPE, ""))), 400),
        (tar_of(("d", None), ("d/" * 200 + "x", b"1")), 400),
        (tar_of(("", b"1")), 400),
        (tar_of(("f", b"1" * 5000))[:2000], 400),  # truncated in a file
        (tar_of(("f", b"1"), ("g", b"1"))[:1024], 400),  # between two members
        (tar_of(("f", b"1"), ("g", b"1"))[:1300], 400),  # in a header
        (tar_of(("f", b"1"))[:1024] + b"garbage" * 200, 400),
        (b"", 400),
        (b"no tar" * 1000, 400),
        (b"\x1f\x8b" + bytes(2000), 400),
    ],
)
def test_a_tar_can_not_leave_its_directory(agent: Asker, tmp_path: Path, data: bytes, status: int) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    target = tmp_path / "target"
    target.mkdir()
    (target / "there").symlink_to("../outside")
    problem(agent.ask("PUT", url(target), data, headers=TAR), status)
    assert sorted(os.listdir(outside)) == ["secret"]  # noqa: PTH208
    assert not [name for name in os.listdir(target) if ".volant-" in name]  # noqa: PTH208
    assert sorted(os.listdir(tmp_path)) == ["outside", "target"]  # noqa: PTH208
    assert (outside / "secret").stat().st_nlink == 1


def test_a_header_of_gigabytes_is_refused_unread(agent: Asker, tmp_path: Path) -> None:
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 5 << 30
    problem(agent.ask("PUT", url(tmp_path / "d"), member.tobuf() + bytes(10240), headers=TAR), 400, "too long")


def test_a_new_directory_is_complete_or_absent(agent: Asker, tmp_path: Path) -> None:
    data = tar_of(("f", b"1" * 100_000), ("g", b"2" * 100_000))
    sock = agent.open(
        f"PUT {url(tmp_path / 'd')} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(data)}\r\n{TAR}\r\n".encode()
    )
    sock.sendall(data[:150_000])
    until(lambda: os.listdir(tmp_path))  # noqa: PTH208
    sock.shutdown(socket.SHUT_RDWR)
    sock.close()
    until(lambda: not os.listdir(tmp_path))  # noqa: PTH208


def test_owners_are_those_of_the_tar_or_of_the_request(agent: Asker, tmp_path: Path) -> None:
    if os.getuid():
        pytest.skip("only root gives files away")
    data = tar_of(("f", b"1"), ("l", (tarfile.SYMTYPE, "f")), uid=1234, gid=4321)
    assert agent.ask("PUT", url(tmp_path / "a"), data, headers=TAR).status == 201
    assert agent.ask("PUT", url(tmp_path / "b", "?user=77:88"), data, headers=TAR).status == 201
    for name in ("f", "l"):
        assert ((tmp_path / "a" / name).lstat().st_uid, (tmp_path / "a" / name).lstat().st_gid) == (1234, 4321)
        assert ((tmp_path / "b" / name).lstat().st_uid, (tmp_path / "b" / name).lstat().st_gid) == (77, 88)


def test_pieces_of_a_body_have_a_deadline_each(agent: Asker) -> None:
    mine, theirs = socket.socketpair()
    with mine, theirs:
        mine.sendall(b"ab")
        request = _http.parse_request(b"PUT /x HTTP/1.1\r\nContent-Length: 4")
        pieces = _stream.Stream(theirs).pieces(request, 0.05)
        assert next(pieces) == b"ab"
        with pytest.raises(_http.Problem, match="in time"):
            next(pieces)
    del agent
