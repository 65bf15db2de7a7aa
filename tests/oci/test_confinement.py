"""The programs that fetch and convert have their own files and nothing else, whatever an image makes them do."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import trio

from tests.oci.kit import extract, tar, write_layout
from tests.oci.registry import FailingRegistry, needs_registry
from tests.oci.test_images import left, opened, programs_in, refused
from tests.web_server import WebServer
from volant.host import Host, as_user, landlock_version
from volant.oci import Isolation, OciError, parse_reference
from volant.oci._store import _close

pytestmark = pytest.mark.programs

PROGRAM = """
import encodings.idna, os, resource, socket, sys
from pathlib import Path
from volant.oci._job import Confinement, confine
secret, place, user = *map(Path, sys.argv[1:3]), int(sys.argv[3]) or None
confine(Confinement(str(place), True, write=(str(place.parent / "target"),), user=user))
def tries(name, act):
    try:
        act()
    except OSError as error:
        print(name, "refused")
    else:
        print(name, "done")
tries("own", lambda: (place / "new").write_bytes(b"x"))
tries("rename", lambda: (place / "new").rename(place / "0.done"))
tries("target", lambda: (place.parent / "target").write_bytes(b"x"))
tries("read", secret.read_bytes)
tries("write", lambda: secret.write_bytes(b"x"))
tries("make", lambda: (secret.parent / "made").touch())
tries("remove", secret.unlink)
tries("mode", lambda: secret.chmod(0o777))
tries("link", lambda: os.link(secret, place / "link"))
tries("connect", lambda: socket.create_connection(("127.0.0.1", 9), 1))
tries("listen", lambda: socket.create_server(("127.0.0.1", 0)))
tries("root", lambda: os.setuid(0) or os.chown(secret, 1, 1))
print("user", os.geteuid())
print("core", resource.getrlimit(resource.RLIMIT_CORE))
"""


SYSTEM_PYTHON = Path("/usr/bin/python3")
USERS = range(65536, 98304)
needs_landlock = pytest.mark.skipif(landlock_version() < 6, reason="the kernel has no Landlock that keeps from signals")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives programs a user of their own")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that lets all users through, as those of a daemon do."""
    directory = Path(tempfile.mkdtemp(prefix="vt", dir="/tmp"))
    directory.chmod(0o711)
    yield directory
    shutil.rmtree(directory)


@pytest.mark.skipif(landlock_version() < 4, reason="the kernel has no Landlock that keeps from TCP")
@pytest.mark.parametrize("users", [pytest.param(USERS, marks=needs_root), None], ids=["own user", "same user"])
async def test_the_converter_can_use_nothing_else(place: Path, users: range | None) -> None:
    secret, scratch, target = place / "kept" / "secret", place / "scratch", place / "target"
    scratch.mkdir()
    secret.parent.mkdir()
    secret.write_bytes(b"key")
    target.touch(mode=0o600)
    isolation = Isolation(users=users, places=(place,))
    await isolation.share(Host(), scratch)
    assert await isolation.prepare_files(Host(), [target], []) == ()
    with trio.fail_after(60):
        done = await trio.run_process(
            [sys.executable, "-c", PROGRAM, str(secret), str(scratch), str(isolation.user or 0)],
            capture_stdout=True, capture_stderr=True, check=False,
        )  # fmt: skip
    said = dict(line.split(" ", 1) for line in done.stdout.decode().splitlines())
    assert done.returncode == 0, done.stderr
    assert {name for name, how in said.items() if how == "done"} == {"own", "rename", "target"}
    assert {name for name, how in said.items() if how == "refused"} == {
        *("read", "write", "make", "remove", "mode", "link", "connect", "listen", "root")
    }
    assert said["core"] == "(0, 0)"
    assert int(said["user"]) == (isolation.user or os.geteuid())
    assert secret.read_bytes() == b"key"


def test_a_place_that_is_missing_is_an_error_with_advice(tmp_path: Path) -> None:
    program = "import sys; from volant.oci._job import *; confine(Confinement(sys.argv[1], False))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "none")], capture_output=True, text=True, timeout=60, check=False
    )
    assert "can't be confined" in done.stderr
    assert "VOLANT_SANDBOX=off" in done.stderr


HOSTILE = """
import os, signal, socket, sys
from pathlib import Path
secret, auth, other = map(Path, sys.argv[1:4])
port, elsewhere = map(int, sys.argv[4:6])
def tries(name, act):
    try:
        act()
    except OSError as error:
        print(name, "refused")
    else:
        print(name, "done")
def build():
    Path("layout/blobs").mkdir(parents=True)
    Path("layout/new").write_bytes(b"x")
    Path("layout/new").rename("layout/blobs/old")
    with open("layout/blobs/old", "rb") as file:
        os.fchmod(file.fileno(), 0o644)
tries("build", build)
tries("auth", auth.read_bytes)
tries("hosts", Path("/etc/hosts").read_bytes)
tries("registry", lambda: socket.create_connection(("127.0.0.1", port), 5).close())
tries("elsewhere", lambda: socket.create_connection(("127.0.0.1", elsewhere), 5).close())
tries("multipath", lambda: socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262).connect(("127.0.0.1", elsewhere)))
tries("fast open", lambda: socket.socket().sendto(b"x", 0x20000000, ("127.0.0.1", elsewhere)))
tries("listen", lambda: socket.create_server(("127.0.0.1", 0)))
for family in socket.AF_INET, socket.AF_INET6:
    tries(f"datagram {family}", lambda: socket.socket(family, socket.SOCK_DGRAM))
tries("unix", lambda: socket.socket(socket.AF_UNIX).connect(str(secret.parent.parent / "api")))
tries("read", secret.read_bytes)
tries("open", (secret.parent / "readable").read_bytes)
tries("list", lambda: os.listdir(secret.parent))
tries("write", lambda: (secret.parent / "new").write_bytes(b"x"))
tries("remove", secret.unlink)
tries("mode", lambda: auth.chmod(0o777))
tries("other", other.read_bytes)
tries("parent", lambda: Path(f"/proc/{os.getppid()}/environ").read_bytes())
tries("kill", lambda: os.kill(os.getppid(), signal.SIGCONT))
tries("root", lambda: os.setuid(0) or os.chown("layout", 1, 1))
tries("shadow", Path("/etc/shadow").read_bytes)
print("user", os.geteuid())
"""
ALLOWED = {"build", "auth", "hosts"}


@needs_landlock
@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason="there is no /usr/bin/python3")
@pytest.mark.parametrize("users", [pytest.param(USERS, marks=needs_root), None], ids=["own user", "same user"])
@pytest.mark.parametrize("transport", ["docker", "oci"])
async def test_a_hostile_skopeo_has_its_own_files_and_the_network_alone(
    place: Path, users: range | None, transport: str
) -> None:
    host, isolation = Host(), Isolation(users=users, places=(place,))
    state, private, work = place / "state", place / "private", place / "work"
    for directory in (state, private / "mine", private / "other", work):
        directory.mkdir(parents=True, mode=0o700)
    (state / "keys").write_bytes(b"key")
    (state / "keys").chmod(0o600)
    (state / "readable").write_bytes(b"key")
    auth, other = private / "mine" / "auth.json", private / "other" / "auth.json"
    for path in (auth, other):
        path.write_bytes(b"{}")
        path.chmod(0o600)
        await isolation.let_read(host, path)
    await isolation.share(host, work)
    with WebServer() as server, WebServer() as elsewhere, socket.socket(socket.AF_UNIX) as api:
        api.bind(str(place / "api"))
        api.listen()
        (place / "api").chmod(0o777)
        ports = [server.port] if transport == "docker" else []
        status, output = await host.processes.run(
            [str(SYSTEM_PYTHON), "-c", HOSTILE, str(state / "keys"), str(auth), str(other),
             str(server.port), str(elsewhere.port)],
            env={"PATH": "/usr/bin"}, cwd=work, timeout_s=60, sandbox=isolation.skopeo(work, transport, [auth], ports),
        )  # fmt: skip
    said = dict(line.split(" ", 1) for line in output.decode().splitlines())
    assert status == 0, output
    user = said.pop("user")
    # A directory of the host is read with the daemon's rights.
    assert int(user) == (USERS[-2] if users and transport == "docker" else os.geteuid())
    assert {name for name, how in said.items() if how == "done"} == ALLOWED | (
        {"registry"} if transport == "docker" else set()
    )
    assert {path.name for path in state.iterdir()} == {"keys", "readable"}
    # What it has made can be read, and its user removes it.
    assert (work / "layout" / "blobs" / "old").read_bytes() == b"x"
    as_user(isolation.user if transport == "docker" else None, lambda: shutil.rmtree(work / "layout"))


@needs_root
@needs_landlock
@needs_registry
async def test_programs_have_a_user_and_files_of_the_cache_are_the_daemons(place: Path) -> None:
    base = tar(("base", {"data": os.urandom(100_000)}))
    images = [write_layout(place / str(number), [base, tar((f"{number}", {"data": b"x"}))]) for number in range(3)]
    users = set[int]()
    isolation = Isolation(users=USERS, places=(place,))

    def look(request: BaseHTTPRequestHandler) -> bool:
        running = programs_in(place / "cache").items()
        users.update(Path(f"/proc/{pid}").stat().st_uid for pid, command in running if "skopeo" in command)
        return False

    archive = place / "archive.tar"
    await trio.run_process(["skopeo", "copy", "--quiet", f"oci:{images[1].layout}:t", f"oci-archive:{archive}:t"])
    archive.chmod(0o600)
    # As some tools write them: skopeo gives the directories that it makes itself to root.
    only_files = place / "only-files.tar"
    with tarfile.open(only_files, "w") as file:
        for path in filter(Path.is_file, images[1].layout.rglob("*")):
            file.add(path, path.relative_to(images[1].layout))
    images[2].layout.chmod(0o700)
    with FailingRegistry(images[0].layout, look) as server:
        async with opened(place, server.address, isolation=isolation) as cache:
            for reference, image in (
                (f"{server.address}/app:t", images[0]),
                (f"oci-archive:{only_files}:t", images[1]),
                (f"oci-archive:{archive}:t", images[1]),
                (f"oci:{images[2].layout}:t", images[2]),
            ):
                found = await cache.obtain(parse_reference(reference), auth=b'{"auths":{}}')
                assert found.digest == image.digest
                extract(found.metadata, found.layers, place / f"tree-{os.urandom(4).hex()}")
    assert users == {USERS[-2]}
    assert left(place) == []
    files = [path for path in (place / "cache/oci").rglob("*") if path.suffix == ".erofs"]
    assert files
    for path in files:
        figures = path.stat()
        # An access list for a group shows as the mode of one.
        assert (figures.st_uid, figures.st_mode & 0o337) == (os.geteuid(), 0), path


@needs_root
@needs_registry
async def test_an_archive_that_is_no_file_is_an_error_at_once(place: Path) -> None:
    os.mkfifo(place / "pipe")
    async with opened(place, isolation=Isolation(users=USERS, places=(place,))) as cache:
        for name in ("pipe", "missing", ""):
            error = await refused(cache, parse_reference(f"oci-archive:{place / name}"))
            assert error.code == "image_not_found"
    assert left(place) == []


def test_a_file_that_is_still_being_written_to_is_no_layer(tmp_path: Path) -> None:
    path = tmp_path / "0.erofs"
    with path.open("wb"), pytest.raises(OciError, match="still being written to"):
        _close(path)
    _close(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o400
