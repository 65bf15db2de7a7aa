"""A crafted backup deletes nothing, signals nothing and runs nothing: it is refused, with a text that says why."""

from __future__ import annotations

import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import apsw
import httpx
import msgspec
import pytest
import trio

from tests.attackers import crafted_backup
from tests.attackers.crafted_backup import FILES, MEMBERS, Victim, make
from tests.journal.kit import running
from tests.processes import killed_after
from tests.system.kit import Daemon
from volant.host import Host, Process, ProcessGone
from volant.journal import DatabaseRefused, Evidence, Running, restore_offline
from volant.model import ProcessIdentity, Status, VmRow

INSTANCE = "0" * 10
START_S = 60.0
"""How long a daemon may take to start or to refuse."""


def restore(file: Path, path: Path, evidence: Evidence | None = None) -> None:
    restore_offline(Host(), path, file, evidence or Evidence(), INSTANCE, replace=False)


def test_a_valid_backup_is_restored(tmp_path: Path) -> None:
    """So that the other tests fail only because of what is crafted."""
    path = tmp_path / "volant.db"
    restore(make(tmp_path / "backup.db"), path)
    with apsw.Connection(str(path)) as connection:
        assert connection.execute("SELECT name FROM vms").fetchall() == [("crafted",)]


@pytest.mark.parametrize("how", MEMBERS)
def test_a_backup_with_a_crafted_member_is_refused_by_name(how: str, tmp_path: Path) -> None:
    file, path = make(tmp_path / "backup.db", how), tmp_path / "volant.db"
    member = MEMBERS[how]
    with pytest.raises(DatabaseRefused) as refused:
        restore(file, path)
    text = str(refused.value)
    assert f"table {member.stored_in}, row " in text
    assert member.named.rpartition(".")[2] in text, text
    assert not path.exists()


@pytest.mark.parametrize("how", MEMBERS)
async def test_a_database_with_a_crafted_member_is_not_used_at_start(how: str, tmp_path: Path) -> None:
    """As an earlier version that trusted backups may have left it."""
    path = make(tmp_path / "volant.db", how)
    before = path.read_bytes()
    with pytest.raises(DatabaseRefused, match=f"table {MEMBERS[how].stored_in}, row ") as refused:
        async with running(path):
            pass
    assert "`volantd restore BACKUP` puts a backup in its place" in str(refused.value)
    with apsw.Connection(str(path)) as connection:
        assert connection.execute("SELECT count(*) FROM vms").get == 1
    assert len(path.read_bytes()) == len(before)


@pytest.mark.parametrize("how", FILES)
def test_a_database_that_is_crafted_as_a_file_is_refused(how: str, tmp_path: Path) -> None:
    file, path = make(tmp_path / "backup.db"), tmp_path / "volant.db"
    FILES[how](file)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DatabaseRefused):
        restore(file, path)
    # Executing its schema would have taken gigabytes.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown < 300 * 1024
    assert sorted(each.name for each in tmp_path.iterdir()) == ["backup.db"]


def test_processes_in_a_backup_are_dropped(tmp_path: Path) -> None:
    """Also processes that look like the daemon's: of another daemon on this host, or of another VM."""
    tag = "volant-1111111111-7.1"
    row = crafted_backup.vm_row() | {"status": "running", "tag": tag, "serial_socket": "/run/x/vms/7/console.sock"}
    row["process"] = {"pid": 4242, "start_time": 1, "boot_id": "b", "tag": tag}
    path = tmp_path / "volant.db"
    file = make(tmp_path / "backup.db")
    with apsw.Connection(str(file)) as connection:
        connection.execute("UPDATE vms SET row = ?", (msgspec.json.encode(row),))
    restore(file, path)
    assert _only_row(path).process is None
    assert _only_row(path).tag == f"volant-{INSTANCE}-7.1"
    assert _only_row(path).serial_socket is None

    identity = ProcessIdentity(pid=77, start_time=5, boot_id="c", tag=f"volant-{INSTANCE}-7.3")
    path.unlink()
    restore(file, path, Evidence(7, {7: Running(3, identity, "/run/v/vms/7/console.sock")}))
    after = _only_row(path)
    assert (after.process, after.tag, after.boots, after.status) == (identity, identity.tag, 3, Status.RUNNING)


def test_a_console_in_a_deep_runtime_directory_is_accepted(tmp_path: Path) -> None:
    """A socket's address has 108 bytes; a path may have 4096."""
    socket = f"/{'deep/' * 100}vms/7/console.sock"
    file = make(tmp_path / "backup.db")
    with apsw.Connection(str(file)) as connection:
        row = crafted_backup.vm_row() | {"serial_socket": socket}
        connection.execute("UPDATE vms SET row = ?", (msgspec.json.encode(row),))
    restore(file, tmp_path / "volant.db")


def _only_row(path: Path) -> VmRow:
    with apsw.Connection(str(path)) as connection:
        row = connection.execute("SELECT row FROM vms").get
    return msgspec.json.decode(row, type=VmRow)


# Against a real daemon


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    """A directory with a file, and a session leader with an argument of its own."""
    directory = tmp_path / "somebodys"
    directory.mkdir()
    (directory / "work").write_text("of years")
    word = f"3600.{time.time_ns() % 10**6:06}"
    with subprocess.Popen(["sleep", word], start_new_session=True) as process:
        try:
            fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
            boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            identity = {"pid": process.pid, "start_time": int(fields[19]), "boot_id": boot_id, "tag": word}
            yield Victim(directory, identity)
            assert process.poll() is None, "somebody's process was ended"
            assert (directory / "work").read_text() == "of years"
        finally:
            process.kill()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that boots nothing, so it needs no image."""
    made = Daemon(tmp_path / "cache", "--api-allow-cidr", "127.0.0.0/8", ephemeral=False)
    try:
        yield made
    finally:
        made.discard()


HARMFUL = ("layer, relative", "layer, absolute", "layer, parent", "tag", "template", "checkpoint", "snapshot's id")


@pytest.mark.parametrize("how", HARMFUL)
async def test_an_offline_restore_harms_nobody(how: str, daemon: Daemon, victim: Victim, tmp_path: Path) -> None:
    daemon.start()
    assert daemon.stop() == 0
    file = make(tmp_path / "backup.db", how, victim)
    at = daemon.command.index("volant.daemon.main") + 1
    command = [*daemon.command[:at], "restore", str(file), *daemon.command[at:]]
    with trio.fail_after(START_S):
        done = await trio.run_process(command, env=daemon.environ, capture_stderr=True, check=False)
    daemon.start()
    async with httpx.AsyncClient(base_url=daemon.base_url, trust_env=False, timeout=30) as http:
        await _delete_all(http)
    assert done.returncode == 1
    assert f"table {MEMBERS[how].stored_in}, row ".encode() in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("how", HARMFUL)
async def test_starting_with_an_earlier_crafted_restore_harms_nobody(how: str, daemon: Daemon, victim: Victim) -> None:
    daemon.state_dir.mkdir(mode=0o700)
    make(daemon.state_dir / "volant.db", how, victim)
    daemon.launch()
    assert daemon.process is not None
    stdout = daemon.process.stdout
    assert stdout is not None
    with killed_after(START_S, daemon.process):
        line = await trio.to_thread.run_sync(stdout.readline)
    stdout.close()
    if line:
        daemon.base_url = line.decode().rpartition(" ")[2].strip()
        async with httpx.AsyncClient(base_url=daemon.base_url, trust_env=False, timeout=30) as http:
            await _delete_all(http)
    assert not line
    assert await trio.to_thread.run_sync(daemon.wait) == 1
    assert f"table {MEMBERS[how].stored_in}, row " in daemon.log().splitlines()[-1]


async def _delete_all(http: httpx.AsyncClient) -> None:
    """Deletes VMs and snapshots, as an unsuspecting operator would."""
    with trio.move_on_after(30):
        while (await http.get("/healthz")).status_code != 200:  # noqa: ASYNC110 - another process's
            await trio.sleep(0.05)
        for kind in ("vms", "snapshots"):
            for each in (await http.get(f"/api/v1/{kind}")).json():
                await http.delete(f"/api/v1/{kind}/{each['name']}")


# The seam below all that


async def test_the_host_removes_and_signals_only_its_own(tmp_path: Path, victim: Victim) -> None:
    own = tmp_path / "own"
    own.mkdir()
    host = Host()
    host.confine([own], f"volant-{INSTANCE}-")
    for path in (victim.directory, own, own / ".." / "somebodys", Path("/"), tmp_path):
        for remove in (
            host.files.remove_tree,
            host.files.remove,
            lambda path: host.threads.run(host.files.unlink, path),
        ):
            with pytest.raises(OSError, match="not below a directory of this daemon"):
                await remove(path)
    identity = msgspec.convert(victim.process, ProcessIdentity)
    assert await host.processes.find(identity.tag) is None
    assert await host.processes.scan(identity.tag[:5]) == []
    with pytest.raises(ProcessGone, match="belongs to another daemon"):
        _open(host, identity)
    (own / "file").touch()
    await host.files.remove_tree(own / "file")
    assert not (own / "file").exists()


def _open(host: Host, identity: ProcessIdentity) -> Process:
    return host.processes.open(identity)
