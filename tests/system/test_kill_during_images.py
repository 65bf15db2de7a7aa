"""`kill -9` of the daemon while it fetches, converts, builds a template, boots, attaches a volume or grows one.

Afterwards each VM runs or says why not, and nothing is left: no process, no file, no half image, no credentials.

A seed decides the order and the moments. The test prints it; `VOLANT_TEST_SEED` repeats it.
"""

from __future__ import annotations

import base64
import os
import re
import subprocess
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from random import Random, SystemRandom

import pytest
import trio

from tests.files import everything_in
from tests.oci.kit import tar, write_layout
from tests.oci.registry import PASSWORD, USER, FailingRegistry, auth_file, needs_registry
from tests.oci.test_images import programs_in
from tests.ports import free_port
from tests.system.kit import BOOT_S, Daemon, Stopwatch, boot, load, own_cache, reachable, run, spec
from tests.system.rootfs import busybox_layer
from tests.web_server import answer
from volant.client import Client
from volant.model import CreateVolume, VmView

pytestmark = [needs_registry, pytest.mark.cold]

ROUNDS = load("VOLANT_TEST_IMAGE_KILLS", usual=6, full=30)
SEED = int(os.environ.get("VOLANT_TEST_SEED") or SystemRandom().randrange(10**6))
WORD = base64.b64encode(f"{USER}:{PASSWORD}".encode())
SMALL, LARGE = 200_000, 256 * 2**20
LOOK_S = 0.002
"""Between looks at what the daemon does."""


class SlowRegistry(FailingRegistry):
    """Requires credentials, and on request holds back the second half of a layer."""

    def __init__(self, layout: Path) -> None:
        super().__init__(layout, self._answers_badly)
        self.slow = ""
        """The digest of that layer."""
        self.half_sent = threading.Event()

    def _answers_badly(self, request: BaseHTTPRequestHandler) -> bool:
        if request.headers["Authorization"] != f"Basic {WORD.decode()}":
            answer(request, 401, b"{}", WWW_Authenticate='Basic realm="tests"')
            return True
        if not self.slow or not request.path.endswith(self.slow):
            return False
        data = (self._blobs / self.slow.removeprefix("sha256:")).read_bytes()
        answer(request, 200, None, Content_Length=len(data))
        request.wfile.write(data[: len(data) // 2])
        request.wfile.flush()
        self.half_sent.set()
        self.released.wait(60)
        request.close_connection = True
        return True


class Rounds:
    """The rounds of one daemon."""

    def __init__(self, daemon: Daemon, cache: Path, registry: SlowRegistry, layout: Path, base: bytes, rng: Random):
        self.daemon = daemon
        self.cache = cache
        self.oci = cache / "oci"
        self.registry = registry
        self.layout = layout
        self.base = base
        self.rng = rng
        self.number = self.size = 0
        self.auth = base64.b64encode(auth_file(registry.address, PASSWORD)).decode()
        self.phases: dict[str, Callable[[Client], Awaitable[None]]] = {
            "pull": self.pull,
            "conversion": self.conversion,
            "template": self.template,
            "first boot": self.first_boot,
            "attach": self.attach,
            "grow": self.grow,
        }

    @property
    def name(self) -> str:
        return f"vm-{self.number}"

    @property
    def volume(self) -> str:
        return f"data-{self.number}"

    async def run(self) -> None:
        rest = [self.rng.choice(sorted(self.phases)) for _ in range(ROUNDS - len(self.phases))]
        order = [*self.phases, *rest][:ROUNDS]
        self.rng.shuffle(order)
        for self.number, phase in enumerate(order):
            watch = Stopwatch()
            async with self.daemon.client() as client:
                await self.phases[phase](client)
            print(f"round {self.number}: killed in {phase}, {watch.seconds:.1f} s", flush=True)

    # Phases: each kills the daemon, starts it, and checks what follows.

    async def pull(self, client: Client) -> None:
        image, layers = self.image(SMALL)
        self.registry.slow = layers[-1]
        self.registry.half_sent.clear()
        self.registry.released.clear()
        await self.create(client, image)
        await trio.to_thread.run_sync(self.registry.half_sent.wait, BOOT_S)
        assert [pull.phase for pull in await client.images.pulls()] == ["fetching"]
        await self.kill(latest_s=0.3)
        self.registry.slow = ""
        self.registry.released.set()
        await self.comes_with_credentials(image)

    async def conversion(self, client: Client) -> None:
        image, _ = self.image(LARGE)
        await self.create(client, image)
        await self.seen(lambda: bool(list(self.oci.glob("work/*/arrived"))))
        # It takes longer to convert.
        await self.kill(latest_s=0.15)
        assert not self.has(image), "the conversion was over when the daemon was killed"
        await self.comes_with_credentials(image)

    async def template(self, client: Client) -> None:
        image = await self.cached(client)
        # Machines of the same memory share a template.
        vm = await client.vms.create(
            spec(self.name, image=image, memory_mb=128 + 16 * self.number, boot="template", start_workload=False)
        )
        with trio.fail_after(BOOT_S):
            while [each.state for each in await client.templates.list()].count("building") != 1:  # noqa: ASYNC110
                await trio.sleep(LOOK_S)
        await self.kill(latest_s=3.0)
        after = await self.comes(vm)
        assert after.booted_from in ("template", "cold"), after

    async def first_boot(self, client: Client) -> None:
        image = await self.cached(client)
        vm = await client.vms.create(spec(self.name, image=image, boot="cold", start_workload=False))
        await self.starts(client)
        await self.kill(latest_s=3.0)
        assert (await self.comes(vm)).boots == 1

    async def attach(self, client: Client) -> None:
        image = await self.cached(client)
        await client.volumes.create(CreateVolume(name=self.volume, size_mb=64))
        vm = await client.vms.create(
            spec(self.name, image=image, boot="cold", start_workload=False, volumes=(f"{self.volume}:/data",))
        )
        await self.starts(client)
        await self.kill(latest_s=4.0)
        async with self.running(vm) as after:
            await run(after, self.name, "sh", "-c", "echo kept >/data/file; cat /data/file")

    async def grow(self, client: Client) -> None:
        image = await self.cached(client)
        await client.volumes.create(CreateVolume(name=self.volume, size_mb=64))
        vm = await boot(
            client, self.name, image=image, boot="cold", start_workload=False, volumes=(f"{self.volume}:/data",)
        )
        [file] = (self.daemon.state_dir / "volumes").iterdir()

        async def resize() -> None:
            # The client repeats it, with its key, until a daemon answers.
            await client.volumes.resize(self.volume, 256)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(resize)
            await self.seen(lambda: file.stat().st_size > 64 * 2**20)
            await self.kill(latest_s=0.01)
        async with self.running(vm) as after:
            assert int((await run(after, self.name, "df", "-m", "/data")).split()[-5]) > 128
            assert [(each.name, each.size_mb) for each in await after.volumes.list()] == [(self.volume, 256)]
            assert file.stat().st_size == 256 * 2**20

    # What they share

    def image(self, size: int) -> tuple[str, list[str]]:
        """Puts a new image into the registry; returns its reference and the digests of its layers."""
        # Short as it is fetched, long to convert.
        data = self.rng.randbytes(min(size, 2**20)) * max(1, size // 2**20)
        self.size = len(data)
        built = write_layout(self.layout, [self.base, tar((f"file-{self.number}", {"data": data}))], kind="tar+zstd")
        return f"{self.registry.address}/app@{built.digest}", built.blobs

    async def cached(self, client: Client) -> str:
        """Returns a new image that the cache has already."""
        image, _ = self.image(SMALL)
        await client.images.pull({"reference": image}, registry_auth=self.auth)
        return image

    async def create(self, client: Client, image: str) -> None:
        await client.vms.create(
            spec(self.name, image=image, boot="cold", start_workload=False), registry_auth=self.auth
        )

    def has(self, image: str) -> bool:
        """Whether the cache has the image as a whole."""
        return (self.oci / "images" / image.rpartition(":")[2] / "image.json").exists()

    async def starts(self, client: Client) -> None:
        """Waits until the VM's process is being started, or has been."""
        with trio.fail_after(BOOT_S):
            while (await client.vms.inspect(self.name))["phase"] not in ("launch", "agent"):  # noqa: ASYNC110
                await trio.sleep(LOOK_S)

    async def seen(self, look: Callable[[], bool]) -> None:
        with trio.fail_after(BOOT_S):
            while not look():  # noqa: ASYNC110 - the daemon is not to notice
                await trio.sleep(LOOK_S)

    async def kill(self, *, latest_s: float) -> None:
        """Kills the daemon at a random moment, and starts it again. Credentials are in its runtime directory alone."""
        await trio.sleep(self.rng.uniform(0.0, latest_s))
        self.daemon.kill()
        assert not list(files_with_credentials(self.daemon.state_dir, self.cache, self.daemon.log_path))
        await trio.to_thread.run_sync(self.daemon.start)

    async def comes_with_credentials(self, image: str) -> None:
        """Checks a VM whose fetch was killed: it can't be repeated without credentials, and the VM says so. With them
        the same VM boots."""
        async with self.daemon.client() as client:
            waited = await client.vms.wait(self.name, ["running", "crashed"], timeout_s=BOOT_S)
            assert waited.vm is not None
            assert waited.vm.reason is not None, waited
            assert (waited.vm.status, waited.vm.reason.code) == ("crashed", "image_unauthorized"), waited
            assert not self.has(image)
            await self.check(client, set())
            await client.images.pull({"reference": image}, registry_auth=self.auth)
            vm = await client.vms.start(self.name)
        async with self.running(vm):
            pass

    async def comes(self, vm: VmView) -> VmView:
        """Waits until a VM runs, checks it, and deletes it."""
        async with self.running(vm) as client:
            return await client.vms.get(self.name)

    @asynccontextmanager
    async def running(self, vm: VmView) -> AsyncIterator[Client]:
        """Waits until a VM runs, gives a client, checks everything, and deletes it."""
        async with self.daemon.client() as client:
            waited = await client.vms.wait(self.name, ["running", "crashed"], timeout_s=BOOT_S)
            after = waited.vm
            assert after is not None
            assert (after.id, after.status, after.reason) == (vm.id, "running", None), after
            await reachable(client, self.name)
            assert await run(client, self.name, "stat", "-c", "%s", f"/file-{self.number}") == f"{self.size}\n"
            yield client
            await self.check(client, {after.pid})
            await client.vms.delete(self.name)
            for volume in await client.volumes.list():
                await client.volumes.delete(volume.name)
            for template in await client.templates.list():
                await client.templates.delete(template.digest)
            await client.images.prune()
            assert await client.images.list() == []
            await self.check(client, set())

    # What must hold

    async def check(self, client: Client, pids: set[int | None]) -> None:
        """Checks that nothing is left but these processes with their files, and whole images."""
        with trio.fail_after(BOOT_S):
            while [each.state for each in await client.templates.list() if each.state != "ready"]:  # noqa: ASYNC110
                await trio.sleep(0.05)
        # The next daemon removes it while it serves already.
        with trio.move_on_after(30):
            while self.left(pids):  # noqa: ASYNC110 - nothing tells
                await trio.sleep(0.05)
        assert self.left(pids) == []
        assert (await client.system.info())["orphans"] == []
        await trio.to_thread.run_sync(check_images, self.oci)

    def left(self, pids: set[int | None]) -> list[str]:
        """Returns what a killed daemon must not leave."""
        daemon = self.daemon
        known = {*pids, daemon.pid}
        found = [f"process {pid} {tag}" for pid, tag in daemon.processes().items() if pid not in known]
        for place in (daemon.root, self.cache):
            found += [f"process {pid} {words}" for pid, words in programs_in(place).items() if pid not in known]
        if len(daemon.files()) > 2 * len(pids):
            found += daemon.files()
        places = (self.oci / "work", daemon.runtime_dir / "registries")
        found += [str(path) for place in places if place.exists() for path in place.iterdir()]
        found += map(str, files_with_credentials(daemon.root, self.cache))
        found += [str(path) for path in everything_in(daemon.state_dir) if path.suffix == ".new"]
        mounts = Path("/proc/self/mountinfo").read_text()
        found += [line for line in mounts.splitlines() if f"{daemon.root}/" in line or f"{self.cache}/" in line]
        ready = {path.name for path in daemon.state_dir.glob("templates/*")}
        found += [
            str(path)
            for path in daemon.memory_dir.glob("template-*")
            if path.name.removeprefix("template-").partition(".")[0] not in ready
        ]
        return found


def files_with_credentials(*places: Path) -> Iterator[Path]:
    """Yields the files in which the password is, in one form or the other."""
    form = re.compile(re.escape(PASSWORD.encode()) + b"|" + re.escape(WORD))
    for place in places:
        for path in everything_in(place) if place.is_dir() else [place]:
            try:
                # Not the memory and the disks of guests, and not what is large: layers.
                if path.is_file() and path.stat().st_size < 2**22 and form.search(path.read_bytes()):
                    yield path
            except FileNotFoundError:
                continue


def check_images(oci: Path) -> None:
    """Checks that every image is whole, and each layer and each name belongs to one."""
    used = set()
    for directory in oci.glob("images/*"):
        names = {path.name for path in directory.iterdir()}
        layers = sorted((name for name in names if name[0].isdigit()), key=lambda name: int(name.partition(".")[0]))
        assert names == {"image.json", "metadata.erofs", "correcting.erofs", "disk.vmdk", *layers}
        devices = [f"--device={directory / name}" for name in (*layers, "correcting.erofs")]
        command = ["fsck.erofs", *devices, "--extract", str(directory / "metadata.erofs")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        used |= {(directory / name).stat().st_ino for name in layers}
    assert {path.stat().st_ino for path in oci.glob("layers/*")} == used
    for path in oci.glob("names/*"):
        assert any(directory.name in path.read_text() for directory in oci.glob("images/*")), path.read_text()


@pytest.mark.full
async def test_kills_leave_no_half_image(make_daemon: Callable[..., Daemon], image_cache: Path, tmp_path: Path) -> None:
    print(f"VOLANT_TEST_SEED={SEED}")
    rng = Random(SEED)
    base = busybox_layer(image_cache)
    layout = tmp_path / "layout"
    write_layout(layout, [base])
    with own_cache(image_cache) as cache, SlowRegistry(layout) as registry:
        daemon = make_daemon(
            *("--templates", "auto", "--listen", f"127.0.0.1:{free_port()}", "--cache-dir", str(cache)),
            *("--oci-plain-http", registry.address),
            ephemeral=False,
        )
        await Rounds(daemon, cache, registry, layout, base, rng).run()
        assert daemon.stop() == 0
        assert daemon.leftovers() == []
