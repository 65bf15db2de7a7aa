"""The second VM of a kind is a clone: fast, with its own identity, and never worse than a cold boot."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio

from tests.system.kit import BOOT_S, Daemon, boot, kept, reachable, run, until
from tests.system.rootfs import make_ext4, plugin
from volant.client import Client
from volant.model import Cloning, HealthCheck, Manifest, Workload

# These tests build their own templates, and damage them.
pytestmark = pytest.mark.cold

T = TypeVar("T")
CLOCK_S = 0.05
WHO = """
import json, os, time
print(json.dumps({
    "urandom": os.urandom(16).hex(),
    "machine_id": open("/etc/machine-id").read().strip(),
    "boot_id": open("/proc/sys/kernel/random/boot_id").read().strip(),
    "hostname": os.uname().nodename,
    "clone": json.load(open("/run/volant-clone.json")),
    "time": time.time(),
}))
"""
FREES = """
import time
x = bytearray(b"x") * (12 << 20)
del x
for what, how in (("drop_caches", "3"), ("compact_memory", "1")):
    with open(f"/proc/sys/vm/{what}", "w") as handle:
        handle.write(how)
time.sleep(3)
"""
COUNTER = """
import json, os, signal, socket
born, told = os.urandom(8).hex(), []
def tell(number, frame):
    told.append(json.load(open("/run/volant-clone.json"))["instance_id"])
signal.signal(signal.SIGUSR1, tell)
listener = socket.create_server(("127.0.0.1", 8080), backlog=16)
print("the workload began", flush=True)
while True:
    with listener.accept()[0] as sock, sock.makefile("rb") as stream:
        while stream.readline().strip():
            pass
        said = {"born": born, "told": told, "now": os.urandom(8).hex(), "env": os.environ.get("WHO")}
        body = json.dumps(said).encode()
        head = f"HTTP/1.1 200 X\\r\\nContent-Type: application/json\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
        sock.sendall(head.encode() + body)
"""


@pytest.fixture(scope="module")
def templates(image_cache: Path, _running: list[Daemon]) -> Iterator[Daemon]:
    """A daemon in which the kind of VM that the tests make has a template."""

    async def prepare(daemon: Daemon) -> None:
        async with daemon.client() as client:
            vm = await boot(client, "first")
            assert (vm.booted_from, vm.boot, vm.fallback) == ("cold", "auto", None)
            await template(daemon)

    with kept(Daemon(image_cache, "--templates", "auto"), _running) as daemon:
        trio.run(prepare, daemon)
        yield daemon


@pytest.fixture
def daemon(templates: Daemon) -> Iterator[Daemon]:
    yield templates
    templates.delete_vms()
    assert templates.hypervisors() == {}
    assert templates.files() == []


async def eventually(look: Callable[[], T], timeout_s: float = BOOT_S) -> T:
    """What `look` finds, once it finds something: in another process, which offers no wait."""
    with trio.fail_after(timeout_s):
        while not (found := look()):  # noqa: ASYNC110
            await trio.sleep(0.02)
    return found


async def template(daemon: Daemon) -> Path:
    """Waits for a template; returns the directory of the newest one."""
    found = await eventually(
        lambda: [p.parent for p in daemon.state_dir.glob("templates/*/template.json") if not p.parent.suffix]
    )
    return max(found, key=lambda path: path.stat().st_mtime)


def digest_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def builds(daemon: Daemon) -> list[str]:
    """The tags of the processes that are to become templates."""
    return [tag for tag in daemon.processes().values() if tag.startswith(f"{daemon.tag_prefix}t.")]


async def who(client: Client, name: str) -> dict[str, Any]:
    """Returns the identity of a guest, once its clock is right: on a busy host it is corrected later."""
    said: list[tuple[float, float, float]] = []
    with trio.move_on_after(BOOT_S):
        while True:
            before = time.time()
            found: dict[str, Any] = json.loads(await run(client, name, "python3.13", "-c", WHO))
            after = time.time()
            if before - CLOCK_S <= found["time"] <= after + CLOCK_S:
                return found
            said.append((before, found["time"], after))
            await trio.sleep(0.5)
    raise AssertionError(f"the clock of {name} is never right: {said}")


async def ask(daemon: Daemon, name: str) -> dict[str, Any]:
    """Returns the answer of the counter's workload."""
    async with daemon.http() as http:
        found: dict[str, Any] = (await http.get(f"/api/v1/vms/{name}/agent/")).raise_for_status().json()
        return found


async def test_clones_have_an_identity_each(daemon: Daemon) -> None:
    async with daemon.client() as client:
        names = [f"clone{number}" for number in range(5)]
        found: dict[str, dict[str, Any]] = {}
        for name in names:
            vm = await boot(client, name)
            assert (vm.booted_from, vm.fallback) == ("template", None)
            found[name] = await who(client, name)
            info = await client.vms.agent_info(name)
            assert info["instance_id"] == found[name]["clone"]["instance_id"]
            assert info["hostname"] == found[name]["hostname"] == found[name]["clone"]["hostname"] == name
            assert found[name]["clone"]["vm_id"] == vm.id
            assert found[name]["clone"]["machine_id"] == found[name]["machine_id"]
        for what in ("urandom", "machine_id", "boot_id", "hostname"):
            assert len({each[what] for each in found.values()}) == len(names), what
        # A write in one is not visible in others.
        await run(client, "clone0", "touch", "/root/mine")
        assert "mine" not in await run(client, "clone1", "ls", "-a", "/root")
        # After a restart, a VM without a disk is a clone again, with the same machine id.
        await client.vms.restart("clone1")
        restarted = await until(client, "clone1", "running")
        assert restarted is not None
        assert (restarted.booted_from, restarted.boots) == ("template", 2)
        again = await who(client, "clone1")
        assert again["machine_id"] == found["clone1"]["machine_id"]
        assert again["boot_id"] != found["clone1"]["boot_id"]


async def test_a_clone_cannot_change_the_memory_of_its_template(daemon: Daemon) -> None:
    memory = (await template(daemon)) / "memory"
    before, room = digest_of(memory), memory.stat().st_blocks
    async with daemon.client() as client:
        assert (await boot(client, "clone")).booted_from == "template"
        # No device through which root in the guest could return memory.
        found = await run(client, "clone", "sh", "-c", "cat /sys/bus/virtio/devices/*/device")
        assert "0x0005" not in found.split(), "it has a balloon"
        await run(client, "clone", "python3.13", "-c", FREES)
        taken = await client.vms.memory("clone")
        assert taken.guest is not None
        assert taken.host.private_mb > 12, "what it wrote is its own"
    assert (digest_of(memory), memory.stat().st_blocks) == (before, room)


async def test_a_vm_boots_in_the_requested_mode(daemon: Daemon) -> None:
    async with daemon.client() as client:
        cold = await boot(client, "cold", boot="cold")
        assert cold.booted_from == "cold"
        # Another kind, without a template: the VM waits until it is built.
        clone = await boot(client, "clone", boot="template", kernel_cmdline="volant.test=1")
        assert clone.booted_from == "template"
        assert "volant.test=1" in await run(client, "clone", "cat", "/proc/cmdline")


@pytest.mark.full
async def test_a_copied_workload_is_notified_and_its_copies_diverge(daemon: Daemon) -> None:
    manifest = Manifest(
        name="counter",
        workload=Workload(entrypoint=("python3.13", "-c", COUNTER), port=8080, health_check=HealthCheck(path="/")),
        template=Cloning(after="workload", signal="SIGUSR1"),
    )
    async with daemon.client() as client:
        await client.plugins.install(manifest)
        said = {}
        for name in ("a", "b"):
            vm = await boot(client, name, plugin="counter", boot="template", env={"WHO": "both"})
            assert vm.booted_from == "template"
            with trio.fail_after(30):
                while not (found := await ask(daemon, name))["told"]:  # noqa: ASYNC110
                    await trio.sleep(0.05)
            said[name] = found
            instance = (await client.vms.agent_info(name))["instance_id"]
            assert found["told"] == [instance], "told once, when the file was there"
        assert said["a"]["born"] == said["b"]["born"]
        assert said["a"]["now"] != said["b"]["now"]
        assert said["a"]["env"] == "both"
        # A VM with its own environment is another kind.
        vm = await boot(client, "c", plugin="counter", env={"WHO": "me"})
        assert vm.booted_from == "cold"
        with trio.fail_after(60):
            while True:
                async with daemon.http() as http:
                    answer = await http.get("/api/v1/vms/a/logs", params={"stream": "stdout"})
                if lines := [json.loads(line)["line"] for line in answer.text.splitlines()]:
                    break
                await trio.sleep(0.1)
        assert lines == ["the workload began"]


@pytest.mark.full
async def test_a_disk_starts_as_a_copy_of_the_templates_disk(daemon: Daemon, image_cache: Path, tmp_path: Path) -> None:
    rootfs = make_ext4(tmp_path / "root.ext4", image_cache, files={"etc/hello": "hello\n"})
    async with daemon.client() as client:
        await client.plugins.install(plugin("disk", rootfs))
        for name in ("a", "b"):
            vm = await boot(client, name, plugin="disk", boot="template")
            assert vm.booted_from == "template"
            assert await run(client, name, "cat", "/etc/hello") == "hello\n"
        await run(client, "a", "mkdir", "/mine")
        await run(client, "a", "sync")
        assert "mine" not in await run(client, "b", "ls", "/")
        assert await run(client, "a", "cat", "/etc/machine-id") != await run(client, "b", "cat", "/etc/machine-id")
        await client.vms.restart("a")
        restarted = await until(client, "a", "running")
        assert restarted is not None
        assert restarted.booted_from == "cold", "its disk is not what the template knows of it"
        assert "mine" in await run(client, "a", "ls", "/")


def touch(directory: Path) -> None:
    os.utime(directory / "memory")


def cut(directory: Path) -> None:
    os.truncate(directory / "state", 1000)


def forge(directory: Path) -> None:
    """Damages a template like a faulty disk: the record still matches, but the content is wrong."""
    state, record = directory / "state", directory / "template.json"
    state.write_bytes(b"x" * state.stat().st_size)
    figures, said = state.stat(), json.loads(record.read_text())
    said["fingerprints"]["state"] = f"{figures.st_ino}.{figures.st_size}.{figures.st_mtime_ns}"
    said["state_sha256"] = hashlib.sha256(state.read_bytes()).hexdigest()
    record.write_text(json.dumps(said))


@pytest.mark.full
@pytest.mark.parametrize("damage", [touch, cut, forge])
async def test_a_damaged_template_costs_a_cold_boot_and_is_reported(
    image_cache: Path, make_daemon: Callable[..., Daemon], damage: Callable[[Path], None]
) -> None:
    daemon = make_daemon("--templates", "auto", ephemeral=False)
    async with daemon.client() as client:
        await boot(client, "vm", boot="template")
        directory = await template(daemon)
        await client.vms.delete("vm")
    # The daemon has cached nothing about it.
    assert daemon.stop() == 0
    damage(directory)
    daemon.start()
    async with daemon.client() as client:
        vm = await boot(client, "vm", boot="auto")
        assert vm.booted_from == "cold"
        assert directory.name in daemon.log()
        if damage is forge:
            assert vm.fallback is not None
            assert vm.fallback.code == "template_refused"
            assert "boots cold, as the clone of template" in daemon.log()
            async with daemon.http() as http:
                metrics = (await http.get("/metrics")).text
            assert 'volant_template_fallbacks_total{reason="template_refused"} 1.0' in metrics
        else:
            assert vm.fallback is None
            # The template is built again.
            assert (await template(daemon)).name == directory.name
        await reachable(client, "vm")


async def test_kill_nine_in_the_middle_of_a_build_leaves_nothing(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--templates", "auto", ephemeral=False)
    async with daemon.client() as client:
        await boot(client, "vm")
    building = await eventually(lambda: builds(daemon))
    daemon.kill()
    assert builds(daemon) == building, "it goes on without the daemon"
    assert list(daemon.state_dir.glob("templates/*.new"))
    daemon.start()
    await eventually(
        lambda: (
            not builds(daemon)
            and not list(daemon.state_dir.glob("templates/*"))
            and not list(daemon.memory_dir.glob("template-*"))
            and not list(daemon.runtime_dir.glob("templates/*"))
        )
    )
    async with daemon.client() as client:
        assert len(daemon.hypervisors()) == 1
        await reachable(client, "vm")


@pytest.mark.full
async def test_a_clean_stop_ends_a_build(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--templates", "auto", ephemeral=False)
    async with daemon.client() as client:
        await boot(client, "vm")
    await eventually(lambda: builds(daemon))
    assert daemon.stop() == 0
    assert not builds(daemon)
    assert not list(daemon.state_dir.glob("templates/*"))
    daemon.start()
    async with daemon.client() as client:
        await reachable(client, "vm")
