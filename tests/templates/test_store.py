"""The template store returns whole and untouched templates only."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest

from volant.host import Host
from volant.templates import GuestConfig, TemplateKey, TemplateSpec, TemplateStore

KEY = TemplateKey(
    hypervisor="qemu 10.0.13", kernel="k", initramfs="i", rootfs=None, cmdline="", cpu_cores=1, memory_mb=64
)
DAY = timedelta(days=1)


def spec_of(key: TemplateKey) -> TemplateSpec:
    return TemplateSpec(
        key=key,
        digest=key.digest,
        plugin="base",
        kernel=Path("/k"),
        initramfs=Path("/i"),
        rootfs=None,
        accelerator="tcg",
    )


async def add(store: TemplateStore, key: TemplateKey, size: int = 8192) -> Path:
    digest = key.digest
    fresh = store.directory / f"{digest}.new"
    fresh.mkdir(parents=True)
    for name in ("memory", "state", *(["root.qcow2"] if key.rootfs else [])):
        (fresh / name).write_bytes(os.urandom(size))
    await store.add(fresh, digest, key, "base")
    return store.directory / digest


def fresh_store(tmp_path: Path) -> TemplateStore:
    """A store that has read no template yet, as after a restart."""
    return TemplateStore(Host(), tmp_path / "t")


@pytest.mark.parametrize(
    "other",
    [
        {"hypervisor": "qemu 10.1.0"},
        {"kernel": "x"},
        {"initramfs": "x"},
        {"rootfs": "x"},
        {"cmdline": "debug"},
        {"cpu_cores": 2},
        {"memory_mb": 128},
        {"config": GuestConfig({"name": "a"}, {})},
    ],
)
def test_everything_that_determines_a_guest_is_in_the_digest(other: dict[str, object]) -> None:
    assert msgspec.structs.replace(KEY, **other).digest != KEY.digest


def test_the_order_of_an_environment_is_not_in_the_digest() -> None:
    one = msgspec.structs.replace(KEY, config=GuestConfig({}, {"env": {"a": "1", "b": "2"}}))
    two = msgspec.structs.replace(KEY, config=GuestConfig({}, {"env": {"b": "2", "a": "1"}}))
    assert one.digest == two.digest


async def test_an_added_template_is_found_also_after_a_restart(tmp_path: Path) -> None:
    store = fresh_store(tmp_path)
    assert await store.find(KEY, KEY.digest) is None
    key = msgspec.structs.replace(
        KEY, rootfs="r", config=GuestConfig({"name": "a", "x": ["y"]}, {"entrypoint": ("a",)})
    )
    directory = await add(store, key)
    for each in (store, fresh_store(tmp_path)):
        found = await each.find(key, key.digest)
        assert found is not None
        assert found.layer == directory / "root.qcow2"
    assert await TemplateStore(Host(), tmp_path / "t", enabled=False).find(key, key.digest) is None


def truncate(directory: Path) -> None:
    os.truncate(directory / "memory", 100)


def touch(directory: Path) -> None:
    os.utime(directory / "state")


def replace(directory: Path) -> None:
    data = (directory / "memory").read_bytes()
    (directory / "memory").unlink()
    (directory / "memory").write_bytes(data)


def lose(directory: Path) -> None:
    (directory / "state").unlink()


def garble(directory: Path) -> None:
    (directory / "template.json").write_text("{")


def misspell(directory: Path) -> None:
    """Leaves JSON that is no UTF-8."""
    record = directory / "template.json"
    record.write_bytes(record.read_bytes().replace(b'"base"', b'"b\xffse"'))


def flip(directory: Path) -> None:
    """Flips a bit, without a trace in what `stat` says."""
    state = directory / "state"
    before = state.stat()
    data = bytearray(state.read_bytes())
    data[0] ^= 1
    with state.open("r+b") as file:
        file.write(data)
    os.utime(state, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("damage", "known"),
    [
        *((damage, False) for damage in (truncate, touch, replace, lose, garble, misspell, flip)),
        # The rest was read once, and is known by heart.
        *((damage, True) for damage in (truncate, touch, replace, lose)),
    ],
)
async def test_a_template_that_was_touched_is_removed(
    tmp_path: Path, damage: Callable[[Path], None], known: bool
) -> None:
    store = fresh_store(tmp_path)
    directory = await add(store, KEY)
    if known:
        assert await store.find(KEY, KEY.digest) is not None
    damage(directory)
    store = store if known else fresh_store(tmp_path)
    assert await store.find(KEY, KEY.digest) is None
    assert not directory.exists()


async def test_a_sweep_removes_half_made_templates_only(tmp_path: Path) -> None:
    store = fresh_store(tmp_path)
    directory = await add(store, KEY)
    for name in ("f" * 32 + ".new", "e" * 32, "something"):
        (store.directory / name).mkdir()
        (store.directory / name / "memory").touch()
    await store.sweep()
    assert [path.name for path in store.directory.iterdir()] == [directory.name]


async def test_the_least_recently_used_template_is_evicted_first(tmp_path: Path) -> None:
    store = fresh_store(tmp_path)
    keys = [msgspec.structs.replace(KEY, cmdline=str(number)) for number in range(3)]
    for key in keys:
        await add(store, key, size=64 * 1024)
    assert await store.find(keys[0], keys[0].digest) is not None
    await store.evict(max_bytes=300 * 1024, max_age=DAY)
    assert set(await store.all()) == {keys[0].digest, keys[2].digest}
    # What was used is known to a successor.
    await fresh_store(tmp_path).evict(max_bytes=200 * 1024, max_age=DAY)
    assert set(await store.all()) == {keys[0].digest}


@pytest.mark.parametrize("damage", [garble, misspell])
async def test_a_damaged_template_does_not_keep_others_from_eviction(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    store = fresh_store(tmp_path)
    damage(await add(store, msgspec.structs.replace(KEY, cmdline="debug")))
    directory = await add(store, KEY)
    store = fresh_store(tmp_path)
    assert set(await store.all()) == {KEY.digest}
    await store.evict(max_bytes=0, max_age=DAY)
    assert not directory.exists()


async def test_an_unused_template_is_evicted(tmp_path: Path) -> None:
    store = fresh_store(tmp_path)
    directory = await add(store, KEY)
    await store.evict(max_bytes=2**30, max_age=DAY)
    assert directory.exists()
    said = json.loads((directory / "template.json").read_text())
    said["created_at"] = "2020-01-01T00:00:00Z"
    (directory / "template.json").write_text(json.dumps(said))
    (directory / "used").unlink(missing_ok=True)
    await fresh_store(tmp_path).evict(max_bytes=2**30, max_age=DAY)
    assert not directory.exists()
