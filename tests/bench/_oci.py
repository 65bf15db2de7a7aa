"""Measures fetch and conversion of an OCI image beside `skopeo copy` alone, from a registry on the loopback."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import trio

from tests.oci.kit import tar, write_layout
from tests.oci.registry import Registry
from volant.host import Host
from volant.oci import Isolation, Skopeo, open_images, parse_reference

from ._figure import Figure, Pairs
from ._world import Skipped, scratch

ROUNDS = 3
LAYERS = 3
LAYER_MB = 64


async def oci_fetch() -> list[Figure]:
    """MB of uncompressed layers a second, from the registry to file systems in the cache."""
    if not all(map(shutil.which, ("docker-registry", "skopeo", "mkfs.erofs"))):
        raise Skipped("docker-registry, skopeo or erofs-utils is not installed")
    with scratch() as directory, Registry(directory / "registry") as registry:
        # Half of it can't be compressed.
        layers = [
            tar(*((f"{layer}/{number}", {"data": os.urandom(2**19) + bytes(2**19)}) for number in range(LAYER_MB)))
            for layer in range(LAYERS)
        ]
        image = write_layout(directory / "layout", layers)
        await trio.to_thread.run_sync(registry.push, image.layout, "app:t")
        rates = Pairs()
        for number in range(ROUNDS):
            rates.add(
                await _fetched(registry, directory / f"ours-{number}"),
                await _copied(registry, directory / f"bare-{number}"),
            )
    return [Figure("oci_fetch", rates.value, "MB/s", rates.ratio, "skopeo copy alone", at_least=0.7)]


async def _fetched(registry: Registry, directory: Path) -> float:
    skopeo = Skopeo(Host(), directory / "private", plain_http=frozenset([registry.address]), isolation=Isolation())
    async with open_images(Host(), directory / "oci", skopeo) as images:
        began = time.perf_counter()
        await images.obtain(parse_reference(f"{registry.address}/app:t"), auth=registry.auth)
        seconds = time.perf_counter() - began
    shutil.rmtree(directory)
    return LAYERS * LAYER_MB / seconds


async def _copied(registry: Registry, directory: Path) -> float:
    await trio.Path(directory).mkdir()
    (directory / "auth.json").write_bytes(registry.auth)
    command = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", "--src-authfile", str(directory / "auth.json")]
    began = time.perf_counter()
    await trio.run_process([*command, f"docker://{registry.address}/app:t", f"oci:{directory}/layout:t"])
    seconds = time.perf_counter() - began
    shutil.rmtree(directory)
    return LAYERS * LAYER_MB / seconds
