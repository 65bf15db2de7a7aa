"""A guest goes on, on another host, from a snapshot that travelled through a registry, whatever broke on the way."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio

from tests.oci.kit import tar, write_layout
from tests.oci.registry import Registry, needs_registry
from tests.system.kit import Daemon, boot, kept, own_cache, run, until
from tests.system.rootfs import busybox_layer
from tests.transfer.kit import Proxy
from volant.model import PullSnapshot, PushSnapshot, RestoreVm, TakeSnapshot

pytestmark = needs_registry

_AT_ONCE = 8
"""Chunks that may be on their way when a daemon is killed."""
_SOME = 30
_COUNT = "i=0; while :; do i=$((i+1)); echo $i > /run/next; mv /run/next /run/count; sleep 0.2; done"


@pytest.fixture
def proxy(image_cache: Path, tmp_path: Path) -> Iterator[Proxy]:
    """A registry with the image `app:t`."""
    layers = [busybox_layer(image_cache), tar(("etc", {}), ("etc/below", {"data": b"from the image"}))]
    layout = write_layout(tmp_path / "layout", layers, Cmd=["sh"], Env=["PATH=/bin"]).layout
    with Registry(tmp_path / "registry", authenticates=False) as registry, Proxy(registry.address) as running:
        registry.push(layout, "app:t")
        yield running


async def killed_in(daemon: Daemon, transfer: Callable[[], Awaitable[object]], moved: list[str]) -> None:
    """Begins a transfer, kills the daemon in the middle of it, and starts the next one."""
    before = len(moved)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(transfer)
        with trio.fail_after(60):
            while len(moved) < before + _SOME:  # noqa: ASYNC110 - of another thread
                await trio.sleep(0.005)
        daemon.kill()
        # The client would ask the next daemon again.
        nursery.cancel_scope.cancel()
    daemon.start()


async def test_a_guest_goes_on_elsewhere(image_cache: Path, proxy: Proxy, _running: list[Daemon]) -> None:  # noqa: PT019
    flags = ("--oci-plain-http", proxy.address)
    reference = f"{proxy.address}/team/demo"
    with (
        own_cache(image_cache) as cache,
        own_cache(image_cache) as other_cache,
        kept(Daemon(cache, *flags, ephemeral=False), _running) as here,
        kept(Daemon(other_cache, *flags, ephemeral=False), _running) as there,
    ):
        async with here.client() as client:
            await boot(client, "demo", image=f"{proxy.address}/app:t", start_workload=False)
            await run(client, "demo", "sh", "-c", f"({_COUNT}) >/dev/null 2>&1 &")
            await run(
                client, "demo", "sh", "-c", "echo on the disk > /kept; while ! cat /run/count; do sleep 0.1; done"
            )
            await client.snapshots.take("demo", TakeSnapshot(name="first"))
            await killed_in(here, lambda: push(here, "first", f"{reference}:1"), proxy.sent)
        async with here.client() as client:
            assert proxy.requests[-1].startswith(("HEAD", "POST", "PUT"))
            pushed = await client.snapshots.push("first", PushSnapshot(f"{reference}:1"))
            assert pushed.chunks - pushed.sent_chunks >= _SOME
            assert len(proxy.sent) == len(set(proxy.sent))

            await run(client, "demo", "sh", "-c", "echo later > /later")
            at_second = int(await run(client, "demo", "cat", "/run/count"))
            await client.snapshots.take("demo", TakeSnapshot(name="second"))
            sibling = await client.snapshots.push("second", PushSnapshot(f"{reference}:2"))
            print(f"pushed: {pushed}, its sibling: {sibling}")
            assert sibling.sent_chunks < sibling.chunks / 2
            await client.vms.delete("demo")
            for name in ("first", "second"):
                await client.snapshots.delete(name)

        proxy.received.clear()
        await killed_in(there, lambda: pull(there, f"{reference}:1"), proxy.received)
        async with there.client() as client:
            assert await client.snapshots.list() == []
            await client.snapshots.pull(PullSnapshot(f"{reference}:1"))
            # The document and parts of the image come again, and what was on its way.
            assert len(proxy.received) - len(set(proxy.received)) <= _AT_ONCE + 4
            proxy.received.clear()
            second = await client.snapshots.pull(PullSnapshot(f"{reference}@{sibling.digest}", "moved"))
            assert len(proxy.received) == sibling.sent_chunks + 1
            assert second.source == f"{reference}@{sibling.digest}"

            await client.vms.create(RestoreVm(name="again", from_snapshot="moved"))
            vm = await until(client, "again", "running")
            assert vm is not None
            assert vm.booted_from == "snapshot"
            assert await run(client, "again", "cat", "/kept", "/later", "/etc/below") == (
                "on the disk\nlater\nfrom the image"
            )
            # The process counts on in its memory.
            with trio.fail_after(30):
                while int(await run(client, "again", "cat", "/run/count")) <= at_second + 5:  # noqa: ASYNC110
                    await trio.sleep(0.1)


async def push(daemon: Daemon, name: str, reference: str) -> object:
    async with daemon.client() as client:
        return await client.snapshots.push(name, PushSnapshot(reference))


async def pull(daemon: Daemon, reference: str) -> object:
    async with daemon.client() as client:
        return await client.snapshots.pull(PullSnapshot(reference))
