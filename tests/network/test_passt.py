"""passt starts before its hypervisor, ends with it, and belongs to one VM."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import trio

from tests.model.kit import create
from volant.host import Host
from volant.hypervisor.qemu._sandbox import user_of
from volant.model import Lease, PublishedPort, VmRow, user_lease
from volant.network import NetworkFailed, Passt, passt_obstacle, passt_user
from volant.network._passt import passt_argv

pytestmark = pytest.mark.programs

INSTANCE = f"{os.getpid():010x}"

needs_passt = pytest.mark.skipif(shutil.which("passt") is None, reason="needs passt: .ci/system-packages network")


def row_of(vm_id: int, *ports: PublishedPort) -> VmRow:
    return msgspec.structs.replace(create(), id=vm_id, network="user", lease=user_lease(INSTANCE, vm_id), ports=ports)


@pytest.fixture
async def passt(tmp_path: Path) -> AsyncIterator[Passt]:
    passt = Passt(Host(), tmp_path, INSTANCE)
    yield passt
    for vm_id in (7, 8):
        await passt.end(vm_id)


def test_the_command_line_has_the_rows_address_and_no_way_to_loopback() -> None:
    lease = Lease(address="10.0.2.15", prefix=24, gateway="10.0.2.2", mac="02:00:00:00:00:07", tap="")
    ports = [
        PublishedPort(host="127.0.0.1", host_port=8080, guest_port=80),
        PublishedPort(host="0.0.0.0", host_port=53, guest_port=5353, protocol="udp"),
    ]
    argv = passt_argv(Path("/run/7.sock"), Path("/run/7.log"), "volant-a-n.7", lease, ports)
    assert "--no-map-gw" in argv
    words = " ".join(argv)
    assert "--address 10.0.2.15 --netmask 24 --gateway 10.0.2.2" in words
    assert "--tcp-ports 127.0.0.1/8080:80" in words
    assert "--udp-ports 0.0.0.0/53:5353" in words
    nothing = " ".join(passt_argv(Path("/run/7.sock"), Path("/run/7.log"), "volant-a-n.7", lease, []))
    assert nothing.endswith("--tcp-ports none --udp-ports none")


@needs_passt
async def test_passt_listens_after_start_and_a_second_start_keeps_it(passt: Passt) -> None:
    row, other = row_of(7), row_of(8)
    await passt.start(row)
    await passt.start(other)
    (first,) = await passt.host.processes.scan(f"volant-{INSTANCE}-n.7", of_anybody=True)
    await passt.start(row)
    assert await passt.host.processes.scan(f"volant-{INSTANCE}-n.7", of_anybody=True) == [first]
    assert (passt.is_connected(7), passt.is_connected(8)) == (False, False)
    await passt.note_connected(7)
    await passt.note_connected(7)
    await passt.start(row)
    assert (passt.is_connected(7), passt.is_connected(8)) == (True, False), "it is the one that was connected"
    await passt.end(7)
    assert await passt.host.processes.scan(f"volant-{INSTANCE}-n.7", of_anybody=True) == []
    assert len(await passt.host.processes.scan(f"volant-{INSTANCE}-n.8", of_anybody=True)) == 1
    await passt.end(7)
    await passt.end(8)
    assert not passt.host.files.names(passt.runtime_dir / "net")


@needs_passt
async def test_passt_ends_with_its_hypervisor(passt: Passt) -> None:
    await passt.start(row_of(7))
    with closing(socket.socket(socket.AF_UNIX)) as hypervisor:
        hypervisor.connect(str(passt.socket(7)))
    with trio.fail_after(10):
        await passt.ended(7)
    assert await passt.host.processes.scan(f"volant-{INSTANCE}-n.7", of_anybody=True) == []
    # Its leftover files do not matter.
    await passt.start(row_of(7))


@needs_passt
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of another user")
async def test_passt_under_root_has_a_user_that_no_hypervisor_has(passt: Passt) -> None:
    users = range(65536, 98304)
    user = passt_user(users)
    assert user == 98303
    assert user not in {user_of(users, "volant-a-7", vm_id) for vm_id in range(len(users))}
    own = Passt(Host(users=users), passt.runtime_dir, INSTANCE, user)
    await own.start(row_of(7))
    (found,) = await own.host.processes.scan(f"volant-{INSTANCE}-n.7", of_anybody=True)
    assert own.host.proc.status(found).user == user
    assert await own.any_runs()
    await own.start(row_of(7))
    assert await own.host.processes.scan(f"volant-{INSTANCE}-n.7", of_anybody=True) == [found]
    await own.end(7)
    assert not await own.any_runs()


@needs_passt
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start processes of another user")
async def test_an_unfiltered_passt_of_an_earlier_daemon_is_kept_and_logged(
    passt: Passt, caplog: pytest.LogCaptureFixture
) -> None:
    await passt.start(row_of(7))
    (before,) = await passt.host.processes.scan(f"volant-{INSTANCE}-n.7", of_anybody=True)
    assert passt.host.proc.status(before).user == pwd.getpwnam("nobody").pw_uid
    own = Passt(Host(), passt.runtime_dir, INSTANCE, 98303)
    await own.start(row_of(7))
    assert await own.host.processes.scan(f"volant-{INSTANCE}-n.7", of_anybody=True) == [before]
    assert "until you stop and start the VM" in caplog.text
    await own.end(7)
    assert not await own.any_runs()
    caplog.clear()
    await own.start(row_of(7))
    assert not caplog.text


@needs_passt
async def test_a_port_in_use_is_reported(passt: Passt) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(NetworkFailed, match=str(port)) as failed:
            await passt.start(row_of(7, PublishedPort(host="127.0.0.1", host_port=port, guest_port=80)))
    assert failed.value.code == "passt_failed"


async def test_without_passt_the_error_says_what_to_install(passt: Passt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volant.network._passt.PROGRAM", "no-such-passt")
    with pytest.raises(NetworkFailed, match="apt-get install passt") as failed:
        await passt.start(row_of(7))
    assert failed.value.code == "passt_missing"


def test_without_passt_the_obstacle_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volant.network._passt.PROGRAM", "no-such-passt")
    assert "apt-get install passt" in (passt_obstacle() or "")
    monkeypatch.setattr("volant.network._passt.PROGRAM", "sh")
    assert passt_obstacle() is None
