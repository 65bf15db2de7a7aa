"""A program of an image runs in a VM as Podman runs it in a container: the same output, field by field."""

from __future__ import annotations

import difflib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from tests.oci.kit import BuiltImage, tar, write_layout
from tests.oci.registry import needs_registry
from tests.system.kit import Daemon, boot, run, until
from tests.system.rootfs import busybox
from volant.client import Client, LogLine
from volant.model import CreateVolume

pytestmark = [
    pytest.mark.programs,
    needs_registry,
    pytest.mark.skipif(
        shutil.which("podman") is None or os.geteuid() != 0, reason="podman is not installed, or no root"
    ),
]

PODMAN_S = 60.0
REPORT = r"""
echo "ids $(id -u) $(id -g) $(id -G)"
echo "directory $(pwd)"
echo "environment MODE=$MODE PATH=$PATH HOME=$HOME"
echo "umask $(umask)"
echo "program $0"
for word in "$@"; do echo "argument $word"; done
for path in /etc /app /app/tool /app/link /data /data/kept /tmp /work /srv /srv/implied; do
    stat -c "file %n %F %a %u:%g" $path
done
# Docker makes it as root, and Podman as the user.
stat -c "made %n %F" /absent/data
cd /data && for path in $(find . -type d | sort); do stat -c "data %n %a %u:%g" $path; done
for path in $(find . ! -type d ! -name new | sort); do stat -c "data %N %F %a %u:%g %s %Y" $path; done
echo "names $(stat -c %h /data/same)"
echo "seen $(cat /etc/upper) $(ls /etc/removed /opaque /again 2>/dev/null | tr '\n' ' ')"
echo written >> /data/new && echo "volume $(cat /data/new)"
echo "standard error" >&2
exit 3
"""
APPLETS = ("sh", "cat", "echo", "find", "grep", "id", "ls", "pwd", "sleep", "sort", "stat", "tr", "true")


@pytest.fixture(scope="module")
def image(image_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> BuiltImage:
    links = [(f"bin/{name}", {"to": "busybox"}) for name in APPLETS]
    lower = tar(
        ("bin", {}), ("bin/busybox", {"data": busybox(image_cache), "mode": 0o755}), *links,
        ("etc", {}), ("etc/removed", {"data": b"x"}), ("etc/upper", {"data": b"lower"}),
        ("etc/passwd", {"data": b"root:x:0:0::/root:/bin/sh\napp:x:1000:1001::/app:/bin/sh\n"}),
        ("etc/group", {"data": b"root:x:0:\napp:x:1001:\nweb:x:1002:app\nmail:x:1003:other,app\n"}),
        ("app", {"uid": 1000, "gid": 1001}), ("app/tool", {"data": b"", "mode": 0o4755, "uid": 1000, "gid": 1001}),
        ("app/link", {"same_as": "app/tool", "mode": 0o4755, "uid": 1000, "gid": 1001}),
        ("opaque", {}), ("opaque/hidden", {"data": b"x"}),
        ("data", {"uid": 1000, "gid": 1001, "mode": 0o750}),
        ("data/kept", {"data": b"kept", "uid": 1000, "gid": 1001}), ("tmp", {"mode": 0o1777}),
        ("data/tool", {"data": b"x", "mode": 0o6755, "uid": 1002}),
        ("data/same", {"same_as": "data/tool", "mode": 0o6755, "uid": 1002}),
        ("data/link", {"to": "/etc/passwd", "mode": 0o777}), ("data/gone", {"to": "../../gone", "mode": 0o777}),
        ("data/open", {"mode": 0o2775, "gid": 1002}), ("data/open/file", {"data": b"y" * 70_000, "uid": 1000}),
        ("work", {"uid": 1000, "gid": 1001}), ("srv", {"mode": 0o1770, "gid": 1001}),
        ("again", {}), ("again/hidden", {"data": b"x"}),
    )  # fmt: skip
    upper = tar(
        ("etc", {}), ("etc/.wh.removed", {"data": b""}), ("etc/upper", {"data": b"upper"}),
        ("opaque", {}), ("opaque/.wh..wh..opq", {"data": b""}), ("opaque/shown", {"data": b"x"}),
        ("srv/implied/file", {"data": b"x"}), (".wh.again", {"data": b""}), ("again/shown", {"data": b"x"}),
    )  # fmt: skip
    last = tar(("opaque/last", {"data": b"x"}), ("again/last", {"data": b"x"}))
    return write_layout(
        tmp_path_factory.mktemp("oci") / "layout", [lower, upper, last],
        Entrypoint=["/bin/sh", "-c", REPORT, "report"], Cmd=["one", "two words"],
        Env=["MODE=image", "PATH=/bin"], User="app", WorkingDir="/work", Volumes={"/data": {}, "/absent/data": {}},
        Healthcheck={"Test": ["CMD", "/bin/grep", "-q", "upper", "/etc/upper"], "Interval": 10**9, "Retries": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The beginning of a command, with storage of its own. crun needs the second version of cgroups."""
    place = tmp_path_factory.mktemp("podman")
    return [
        *("unshare", "--mount", "sh", "-c", 'mount -t cgroup2 none /sys/fs/cgroup && exec "$@"', "sh"),
        "podman", "--root", f"{place}/storage", "--runroot", f"{place}/run", "--storage-driver", "vfs",
        "--cgroup-manager", "cgroupfs", "--events-backend", "none",
    ]  # fmt: skip


class Report(NamedTuple):
    """What a program has reported."""

    exit_code: int | None
    stdout: list[str]


def check_same(ours: Report, theirs: Report) -> None:
    difference = "\n".join(difflib.unified_diff(theirs.stdout, ours.stdout, "podman", "volant", n=0, lineterm=""))
    assert not difference, difference
    assert ours.exit_code == theirs.exit_code == 3


async def in_podman(podman: list[str], image: BuiltImage, *flags: str) -> Report:
    command = [*podman, "run", "--rm", "--network=none", "--cgroups=disabled", *flags, f"oci:{image.layout}:t"]
    done = await trio.to_thread.run_sync(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=PODMAN_S, check=False)
    )
    assert "standard error" in done.stderr
    return Report(done.returncode, done.stdout.splitlines())


async def in_vm(client: Client, image: BuiltImage, **fields: Any) -> Report:
    await boot(client, "demo", image=f"oci:{image.layout}:t", **fields)
    vm = await until(client, "demo", "stopped")
    assert vm is not None
    assert vm.workload is not None
    streams: dict[str, list[str]] = {"stdout": [], "stderr": []}
    async with client.vms.logs("demo", since=0, streams=["stdout", "stderr"], follow=False) as log:
        async for line in log:
            assert isinstance(line, LogLine)
            streams[line.stream].append(line.line)
    assert "standard error" in streams["stderr"]
    await client.vms.delete("demo")
    return Report(vm.workload.exit_code, streams["stdout"])


@pytest.mark.parametrize(
    ("flags", "fields"),
    [
        ([], {}),
        pytest.param(
            ["--user", "0", "--workdir", "/app", "--env", "MODE=request"],
            {"user": "0", "workdir": "/app", "env": {"MODE": "request"}},
            marks=pytest.mark.full,
        ),
        pytest.param(["--user", "1000:1002"], {"user": "1000:1002"}, marks=pytest.mark.full),
        # Where the user has no entry, Podman and Docker choose different homes.
        pytest.param(
            ["--user", "4000", "--env", "HOME=/tmp"],
            {"user": "4000", "env": {"HOME": "/tmp"}},
            marks=pytest.mark.full,
        ),
    ],
)  # fmt: skip
async def test_a_program_reports_the_same(
    daemon: Daemon, image: BuiltImage, podman: list[str], flags: list[str], fields: dict[str, Any]
) -> None:
    theirs = await in_podman(podman, image, *flags)
    async with daemon.client() as client:
        ours = await in_vm(client, image, **fields)
    check_same(ours, theirs)


@pytest.mark.full
async def test_an_empty_volume_receives_the_same(daemon: Daemon, image: BuiltImage, podman: list[str]) -> None:
    async with daemon.client() as client:
        # The second time there is content.
        for volume, path, times in (("data", "/data", 2), ("other", "/nowhere", 1)):
            await client.volumes.create(CreateVolume(name=volume, size_mb=64))
            for _ in range(times):
                theirs = await in_podman(podman, image, "--volume", f"{volume}:{path}")
                ours = await in_vm(client, image, volumes=(f"{volume}:{path}",))
                check_same(ours, theirs)
            await client.volumes.delete(volume)


@pytest.mark.full
async def test_a_health_check_says_the_same(
    daemon: Daemon, image: BuiltImage, podman: list[str], tmp_path: Path
) -> None:
    # Podman knows health checks of Docker's format only.
    archive = tmp_path / "image.tar"
    reference = f"oci:{image.layout}:t"
    await done("skopeo", "copy", "-q", "--format", "v2s2", reference, f"docker-archive:{archive}:app:t")
    await done(
        *podman, "run", "-d", "--name", "checked", "--network=none", "--cgroups=disabled", "--user", "0",
        "--entrypoint", "/bin/sleep", f"docker-archive:{archive}", "1000",
    )  # fmt: skip
    async with daemon.client() as client:
        try:
            vm = await boot(client, "demo", image=reference, entrypoint=["sleep", "1000"], user="0")
            assert await until(client, "demo", "ready") is not None
            assert (await said(podman), await state(client)) == ("healthy", "healthy")
            await done(*podman, "exec", "checked", "busybox", "rm", "/etc/upper")
            await run(client, "demo", "busybox", "rm", "/etc/upper")
            # The second failure in a row.
            assert [await said(podman) for _ in range(2)] == ["healthy", "unhealthy"]
            with trio.fail_after(PODMAN_S):
                while await state(client) != "unhealthy":  # noqa: ASYNC110 - no event tells
                    await trio.sleep(0.1)
            assert (await client.vms.get("demo")).pid == vm.pid, "the VM runs on, as the container does"
        finally:
            await done(*podman, "rm", "-f", "-t", "0", "checked")


async def done(*command: str) -> str:
    finished = await trio.to_thread.run_sync(
        lambda: subprocess.run(command, capture_output=True, text=True, timeout=PODMAN_S, check=False)
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


async def said(podman: list[str]) -> str:
    """Lets Podman check its container, as its timer would under systemd; returns the state."""
    await trio.to_thread.run_sync(
        lambda: subprocess.run(
            [*podman, "healthcheck", "run", "checked"], capture_output=True, timeout=PODMAN_S, check=False
        )
    )
    return (await done(*podman, "inspect", "checked", "--format", "{{.State.Health.Status}}")).strip()


async def state(client: Client) -> str | None:
    workload = (await client.vms.get("demo")).workload
    return None if workload is None else workload.state
