"""Directories of the host: a guest reads, or writes as their owner, and reaches nothing else of the host."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.kit import Daemon, boot, run
from volant.client import Client
from volant.directories import find_program

pytestmark = [
    pytest.mark.cold,
    pytest.mark.skipif(find_program() is None, reason="needs virtiofsd: .ci/system-packages virtiofsd"),
]

OWNER = 1234 if os.geteuid() == 0 else os.geteuid()


@pytest.fixture(scope="module")
def shared() -> Iterator[Path]:
    """A directory whose part `drop` belongs to an ordinary user and may be written to."""
    root = Path(tempfile.mkdtemp(prefix="vd", dir="/tmp"))
    root.chmod(0o755)
    for name in ("data", "drop", "drop/sub"):
        (root / name).mkdir(mode=0o755)
        (root / name / "file").write_text(f"{name}\n")
        for path in (root / name, root / name / "file"):
            os.chown(path, OWNER if "drop" in name else -1, -1)
    (root / "data/secret").write_text("of root\n")
    (root / "data/secret").chmod(0o600)
    (root / "data/out").symlink_to("/etc/passwd")
    (root / "linked").symlink_to(root / "drop")
    yield root
    shutil.rmtree(root)


@pytest.fixture
def daemon(make_daemon: Callable[..., Daemon], shared: Path) -> Daemon:
    return make_daemon("--host-dirs", f"{shared},{shared}/drop:rw", ephemeral=False)


def virtiofsds(daemon: Daemon) -> list[int]:
    return [pid for pid, tag in daemon.processes().items() if tag.startswith(f"{daemon.tag_prefix}d.")]


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: text.strip() for name, _, text in (line.partition(":") for line in lines)}


async def fails(client: Client, vm: str, command: str) -> None:
    await run(client, vm, "sh", "-c", f"! ( {command} )")


async def test_a_guest_reads_writes_where_it_may_as_the_owner_and_reaches_nothing_else(
    daemon: Daemon, shared: Path
) -> None:
    async with daemon.client() as client:
        vm = await boot(client, "demo", volumes=(f"{shared}/data:/data", f"{shared}/drop:/drop:rw"))
        assert vm.volumes == (f"{shared}/data:/data:ro", f"{shared}/drop:/drop:rw")
        assert await run(client, "demo", "cat", "/data/file", "/drop/sub/file") == "data\ndrop/sub\n"
        # The host changes it meanwhile. The guest keeps the attributes of a file for a second.
        (shared / "data/file").write_text("changed\n")
        await run(client, "demo", "sh", "-c", "until [ $(cat /data/file) = changed ]; do sleep 0.2; done")
        for command in ("echo x >/data/new", "rm /data/file", "mount -o remount,rw /data && echo x >/data/new"):
            await fails(client, "demo", command)
        assert sorted(path.name for path in (shared / "data").iterdir()) == ["file", "out", "secret"]

        script = "cd /drop; mkdir new; echo mine >new/a; mv new/a b; ln -s b link; chmod 640 b; rm -r new sub"
        await run(client, "demo", "sh", "-c", script)
        assert sorted(path.name for path in (shared / "drop").iterdir()) == ["b", "file", "link"]
        made = (shared / "drop/b").stat()
        assert (made.st_uid, stat.S_IMODE(made.st_mode)) == (OWNER, 0o640)
        for command in ("chmod u+s /drop/b", "chmod 2755 /drop/b", "mknod /drop/zero c 1 5"):
            await fails(client, "demo", command)
        assert stat.S_IMODE((shared / "drop/b").stat().st_mode) == 0o640
        # Another user of the guest makes files only as the owner, whatever the mode of the directory is.
        (shared / "drop").chmod(0o777)
        for user, exit_code in ((OWNER, 0), (OWNER + 1, 1)):
            writes = ["sh", "-c", f"echo x >/drop/of-{user}"]
            async with client.vms.exec("demo", writes, user=str(user)) as process:
                async for _ in process:
                    pass
            assert process.end is not None
            assert process.end.exit_code == exit_code, (user, process.end)
        if os.geteuid() == 0:
            assert (shared / f"drop/of-{OWNER}").stat().st_uid == OWNER
        options = await run(client, "demo", "grep", "virtiofs", "/proc/mounts")
        assert all("nosuid,nodev" in line for line in options.splitlines())

        # It reaches nothing else of the host.
        # The guest follows the link in its own root.
        await fails(client, "demo", "grep daemon /data/out")
        await run(client, "demo", "sh", "-c", "ln -s /etc/passwd /drop/way; ln -s ../data/file /drop/up")
        await fails(client, "demo", "grep daemon /drop/way")
        if os.geteuid() == 0:
            await fails(client, "demo", "cat /data/secret")
        for pid in virtiofsds(daemon):
            status = status_of(pid)
            assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
            assert (status["NoNewPrivs"], int(status["Seccomp_filters"]) >= 2) == ("1", True)
            assert os.geteuid() != 0 or status["Uid"].split()[0] != "0"
