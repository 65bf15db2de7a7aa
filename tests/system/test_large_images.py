"""Images with many layers and with a large one: from a registry that wants a password to a file that a guest reads."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import zstandard

from tests.oci.kit import BuiltImage, write_layout
from tests.oci.registry import Registry, needs_registry
from tests.oci.test_images import programs_in
from tests.system.kit import Daemon, Stopwatch, boot, own_cache, run
from tests.system.rootfs import busybox_layer
from volant.client import Client

pytestmark = [needs_registry, pytest.mark.cold]

PIECE, PIECES = 4 * 2**20, 512
"""A file of 2 GiB that is the same piece again and again, at a distance that a window of zstd holds."""
PROGRAMS = {"skopeo", "volant.oci", "mkfs.erofs"}
MOST_MB = 256
"""Of memory that each takes, however large a layer is."""
MOST_GROWTH_MB = 48
"""Of the daemon's memory."""
CAPABILITIES = "+setuid,+setgid,+setpcap,+kill,+sys_ptrace,+net_admin"
"""Those of the daemon as a service."""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry") / "r") as found:
        yield found


@pytest.fixture
def cache(image_cache: Path) -> Iterator[Path]:
    with own_cache(image_cache) as directory:
        yield directory


@pytest.fixture
def daemon(cache: Path, registry: Registry, make_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon with a cache of its own and, as root, no more capabilities than a service has."""
    as_service = ("setpriv", f"--bounding-set=-all,{CAPABILITIES}") if os.geteuid() == 0 else ()
    return make_daemon("--cache-dir", str(cache), "--oci-plain-http", registry.address, wrapper=as_service)


async def pull(client: Client, registry: Registry, image: BuiltImage, name: str) -> str:
    """Pushes an image, and fetches it with credentials. Returns its reference."""
    await trio.to_thread.run_sync(registry.push, image.layout, f"{name}:t")
    reference, watch = f"{registry.address}/{name}:t", Stopwatch()
    auth = base64.b64encode(registry.auth).decode()
    found = await client.images.pull({"reference": reference}, registry_auth=auth)
    assert found.digest == image.digest
    print(f"{name}: in the cache after {watch.seconds:.1f} s")
    return reference


async def sha256_in(client: Client, command: str) -> str:
    return (await run(client, "demo", "sh", "-c", f"{command} | sha256sum")).split()[0]


@pytest.mark.full
async def test_a_vm_has_the_files_of_a_large_layer_that_took_little_memory(
    daemon: Daemon, cache: Path, registry: Registry, image_cache: Path, tmp_path: Path
) -> None:
    piece, first = random.Random(1).randbytes(PIECE), os.urandom(50_000)
    watch = Stopwatch()
    diff_id = await trio.to_thread.run_sync(write_large_layer, tmp_path / "large", piece)
    base = busybox_layer(image_cache, ("first", {"data": first}))
    image = write_layout(tmp_path / "layout", [base], kind="tar+zstd", last=(tmp_path / "large", diff_id))
    print(f"large: made in {watch.seconds:.1f} s")
    before, most = memory_mb(daemon.pid, "VmRSS"), dict.fromkeys(PROGRAMS, 0.0)

    async def measure() -> None:
        while True:
            for pid, command in programs_in(cache).items():
                for name in PROGRAMS:
                    if name in command:
                        most[name] = max(most[name], memory_mb(pid, "VmRSS"))
            await trio.sleep(0.02)

    async with daemon.client() as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(measure)
            reference = await pull(client, registry, image, "large")
            nursery.cancel_scope.cancel()
        grown = memory_mb(daemon.pid, "VmHWM") - before
        print(f"large: the daemon grew by {grown:.0f} MiB; programs took {most}")
        assert grown < MOST_GROWTH_MB
        assert all(0 < size < MOST_MB for size in most.values())
        await boot(client, "demo", image=reference, start_workload=False)
        assert await sha256_in(client, "cat /first") == hashlib.sha256(first).hexdigest()
        assert await run(client, "demo", "stat", "-c", "%s", "/large") == f"{PIECE * PIECES}\n"
        assert await sha256_in(client, f"tail -c {PIECE} /large") == hashlib.sha256(piece).hexdigest()
    print(f"large: {watch.seconds:.1f} s in all")


def write_large_layer(path: Path, piece: bytes) -> str:
    """Writes a compressed layer with a file of `PIECES` such pieces, in little memory. Returns its diff ID."""
    info = tarfile.TarInfo("large")
    info.size = PIECE * PIECES
    plain = hashlib.sha256()
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=23)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    with path.open("wb") as file, compressor.stream_writer(file) as writer:
        for data in (info.tobuf(), *[piece] * PIECES, bytes(1024)):
            plain.update(data)
            writer.write(data)
    return f"sha256:{plain.hexdigest()}"


def memory_mb(pid: int, figure: str) -> float:
    """Returns a figure of /proc/PID/status in MiB; 0 if the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{figure}:")), 0.0)
