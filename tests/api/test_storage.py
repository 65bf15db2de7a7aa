"""What takes space is listed with who uses it; what nobody uses can go, and what somebody uses never does."""

from __future__ import annotations

import fcntl
import hashlib
import struct
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from tests.api.kit import Api, api
from tests.images.test_image_store import place
from tests.names import named
from tests.templates.test_store import KEY, add
from volant.images import ANYWHERE, ArtifactCache, Origins, _artifacts, _store, artifact_path, fetch, users
from volant.logs import LogEntry
from volant.model import Artifact
from volant.templates import TemplateBuilder

LIMIT = 2**20


def put_artifact(path: Path, content: bytes) -> tuple[str, str]:
    """Puts an artifact into the cache; returns its URL and its digest."""
    source = path / f"source-{content.decode()}"
    source.write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    fetch(path / "cache", str(source), digest, max_bytes=LIMIT, origins=ANYWHERE)
    return str(source), digest


def artifact_cache(path: Path, state_dir: Path) -> ArtifactCache:
    """Returns the cache in `path`, as the daemon with this state uses it."""
    return ArtifactCache(path / "cache", state_dir, timeout_s=60, max_mb=1, origins=Origins((path,)))


async def items(served: Api) -> dict[tuple[str, str], dict[str, Any]]:
    answer = await served.client.get("/api/v1/system/df")
    assert answer.status_code == 200, answer.text
    usage = answer.json()
    sizes = [item["bytes"] for item in usage["items"]]
    assert sizes == sorted(sizes, reverse=True)
    assert usage["total_bytes"] == sum(sizes)
    assert usage["reclaimable_bytes"] == sum(item["bytes"] for item in usage["items"] if item["reclaimable"])
    assert usage["state_free_bytes"] > 0
    return {(item["kind"], item["name"]): item for item in usage["items"]}


async def prune(served: Api, query: str = "") -> dict[str, Any]:
    answer = await served.client.post(f"/api/v1/system/prune{query}")
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def install(served: Api, name: str, url: str, digest: str) -> None:
    boot = {"kernel": {"url": url, "sha256": digest}}
    answer = await served.client.post("/api/v1/plugins", json={"name": name, "version": "1", "boot": boot})
    assert answer.status_code == 201, answer.text


async def test_files_that_a_vm_or_a_plugin_uses_stay_and_others_are_removed(served: Api, tmp_path: Path) -> None:
    of_plugin, of_vm, of_nobody = (put_artifact(tmp_path, word) for word in (b"plugin", b"vm", b"nobody"))
    await install(served, "keeper", *of_plugin)
    await install(served, "user", *of_vm)
    await served.crashed("demo", plugin="user")
    for letter in "ab":
        place(tmp_path / "cache", letter * 64)
    _store.make_current(tmp_path / "cache", "a" * 64)
    found = await items(served)
    assert found["artifact", of_plugin[1]]["used_by"] == ["plugin keeper"]
    assert found["artifact", of_vm[1]]["used_by"] == ["VM demo", "plugin user"]
    assert found["artifact", of_nobody[1]] == {
        "kind": "artifact", "name": of_nobody[1], "bytes": 4096, "used_by": [], "reclaimable": True,
    }  # fmt: skip
    assert {key[1]: item["reclaimable"] for key, item in found.items() if key[0] == "image"} == {
        "a" * 64: False,
        "b" * 64: True,
    }
    assert found["journal", "volant.db"]["bytes"] > 0
    assert not found["journal", "volant.db"]["reclaimable"]

    dry = await prune(served, "?dry_run=true")
    expected = {("artifact", of_nobody[1]), ("image", "b" * 64)}
    assert {(item["kind"], item["name"]) for item in dry["items"]} == expected
    assert set(await items(served)) == set(found)
    done = await prune(served)
    assert done == {**dry, "dry_run": False}
    assert set(found) - set(await items(served)) == expected
    assert (await prune(served))["items"] == []


async def test_logs_of_deleted_vms_are_removed_and_those_of_others_stay(served: Api) -> None:
    for name in ("demo", "gone"):
        vm = await served.crashed(name)
        log = served.deps.logs.open(vm["id"], named(name))
        log.append([_entry("x" * 100)])
    assert (await served.client.delete("/api/v1/vms/gone")).status_code == 204
    found = {key[1]: item for key, item in (await items(served)).items() if key[0] == "log"}
    said = {vm_id: (item["used_by"], item["reclaimable"]) for vm_id, item in found.items()}
    assert said == {str(vm["id"] - 1): (["VM demo"], False), str(vm["id"]): ([], True)}
    done = await prune(served, "?kind=log")
    assert [item["name"] for item in done["items"]] == [str(vm["id"])]
    assert done["freed_bytes"] > 100
    left = [path.name.partition("-")[0] for path in (served.deps.store.path.parent / "logs").iterdir()]
    assert left == [str(vm["id"] - 1)]


def _entry(line: str) -> LogEntry:
    return LogEntry(stream="console", line=line.encode(), timestamp=datetime.now(UTC), source="c", position=len(line))


async def test_disks_and_databases_without_a_vm_are_removed_only_when_named(served: Api, tmp_path: Path) -> None:
    for path in ("disks/7-x/root.qcow2", "run/vms/8/qmp.sock", "mem/9.mem", "volant-before-0a0b.db"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x" * 5000)
    planted = {("disk", "7-x"), ("leftover", "8"), ("leftover", "9.mem"), ("database", "volant-before-0a0b.db")}
    assert {key for key, item in (await items(served)).items() if item["reclaimable"]} == planted
    assert {item["name"] for item in (await prune(served))["items"]} == {"8", "9.mem"}
    assert (tmp_path / "disks/7-x/root.qcow2").exists()
    assert [item["name"] for item in (await prune(served, "?kind=disk,database"))["items"]] == [
        "volant-before-0a0b.db",
        "7-x",
    ]
    assert not list((tmp_path / "disks").iterdir())
    answer = await served.client.post("/api/v1/system/prune?kind=everything")
    assert answer.status_code == 400
    assert "everything" in answer.json()["detail"]
    # The database itself can't be named away.
    assert (await prune(served, "?kind=journal,cache"))["items"] == []


@pytest.fixture
async def unswept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Api]:
    async def sweep(builder: TemplateBuilder) -> None:
        await builder._host.files.mkdir(builder._store.directory)

    monkeypatch.setattr(TemplateBuilder, "sweep", sweep)
    async with api(tmp_path) as running:
        yield running


async def test_templates_are_removed_unless_a_clone_runs_or_they_were_used_lately(
    unswept: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = unswept
    store = served.deps.vms.templates.template_store
    used, idle = KEY, msgspec.structs.replace(KEY, cmdline="idle")
    for key in (used, idle):
        await add(store, key)
    (store.directory / ("f" * 32 + ".new")).mkdir()
    (store.directory / "not-ours").mkdir()
    vm = await served.crashed("demo")
    projection = served.deps.store.projection
    row = projection.by_id(vm["id"])
    assert row is not None
    monkeypatch.setitem(projection._by_id, vm["id"], msgspec.structs.replace(row, template=used.digest))
    found = {key[1]: item for key, item in (await items(served)).items() if key[0] == "template"}
    assert found[used.digest]["bytes"] > 16_000
    assert {name: (item["used_by"], item["reclaimable"]) for name, item in found.items()} == {
        used.digest: (["VM demo"], False),
        idle.digest: ([], True),
        "f" * 32 + ".new": (["a build of a template"], False),
        "not-ours": (["a build of a template"], False),
    }
    assert (await prune(served, "?kind=template&unused_for=1h"))["items"] == []
    answer = await served.client.post("/api/v1/system/prune?unused_for=soon")
    assert (answer.status_code, answer.json()["field"]) == (400, "unused_for")
    assert [item["name"] for item in (await prune(served))["items"]] == [idle.digest]
    assert set(await store.all()) == {used.digest}
    assert await store.find(idle, idle.digest) is None


async def test_an_image_that_a_foreign_hypervisor_has_open_stays(served: Api, tmp_path: Path) -> None:
    _, digest = put_artifact(tmp_path, b"shared")
    with artifact_path(tmp_path / "cache", digest).open("rb") as file:
        # As QEMU does: a shared lock on some byte, of the open file.
        fcntl.fcntl(file, 37, struct.pack("hhqqi4x", fcntl.F_RDLCK, 0, 100, 1, 0))
        done = await prune(served)
        assert (done["items"], [kept["name"] for kept in done["kept"]]) == ([], [digest])
        assert artifact_path(tmp_path / "cache", digest).exists()
    assert [item["name"] for item in (await prune(served))["items"]] == [digest]


async def test_what_another_daemon_with_the_same_cache_uses_stays_for_as_long_as_that_has_a_state(
    served: Api, tmp_path: Path
) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    other.mkdir()
    url, digest = put_artifact(tmp_path, b"theirs")
    artifact = Artifact(url=url, sha256=digest)
    artifacts = artifact_cache(tmp_path, other)
    place(cache, "b" * 64)
    users(cache).note("b" * 64, other)
    # This daemon has used it, too, and a third one, of which nothing is left.
    for state_dir in (served.deps.store.path.parent, tmp_path / "gone"):
        await artifact_cache(tmp_path, state_dir).obtain(artifact)
    await artifacts.obtain(artifact)
    found = await items(served)
    for key in (("artifact", digest), ("image", "b" * 64)):
        assert (found[key]["used_by"], found[key]["reclaimable"]) == ([f"the daemon of {other}"], False)
    assert (await prune(served))["items"] == []
    # Whoever asks for it finds it, without another fetch.
    (tmp_path / "source-theirs").unlink()
    assert (await artifacts.obtain(artifact)).path.read_bytes() == b"theirs"

    other.rmdir()
    assert {item["name"] for item in (await prune(served))["items"]} == {digest, "b" * 64}
    assert not list((cache / "users").iterdir())


async def test_a_lookup_of_an_artifact_that_is_being_fetched_does_not_wait(tmp_path: Path) -> None:
    cache, owner, digest = tmp_path / "cache", tmp_path / "state", "c" * 64
    owner.mkdir()
    with _artifacts.locked_part(cache, digest), trio.fail_after(10):
        # In a thread, which nobody could call back.
        look = partial(_artifacts.use_artifact, cache, digest, owner)
        assert await trio.to_thread.run_sync(look, abandon_on_cancel=True) is None
    assert users(cache).of(digest) == [owner]


async def test_an_artifact_that_another_daemon_has_begun_to_use_since_it_was_listed_stays(
    served: Api, tmp_path: Path
) -> None:
    cache, other = tmp_path / "cache", tmp_path / "other"
    other.mkdir()
    url, digest = put_artifact(tmp_path, b"theirs")
    ours, theirs = artifact_cache(tmp_path, tmp_path), artifact_cache(tmp_path, other)
    await theirs.obtain(Artifact(url=url, sha256=digest))
    assert not await ours.remove(digest, in_use=lambda: False)
    assert artifact_path(cache, digest).exists()


async def test_prune_does_not_wait_for_a_build(served: Api, tmp_path: Path) -> None:
    place(tmp_path / "cache", "b" * 64)
    with _store.locked(tmp_path / "cache", lambda: None):
        done = await prune(served)
    assert [(kept["name"], kept["reason"]) for kept in done["kept"]] == [("b" * 64, "an image is being built")]


async def test_an_artifact_that_is_needed_while_it_is_removed_is_fetched_again(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    url, digest = put_artifact(tmp_path, b"wanted")
    artifacts = artifact_cache(tmp_path, tmp_path)
    asked = False

    def in_use() -> bool:
        # From here on the file counts as gone; who comes later finds it gone, and nobody finds half of it.
        nonlocal asked
        assert not asked
        asked = True
        return False

    async with trio.open_nursery() as nursery:
        nursery.start_soon(_gone, artifacts, digest, in_use)
        await trio.testing.wait_all_tasks_blocked(0.0)
        found = await artifacts.obtain(Artifact(url=url, sha256=digest))
        assert asked
        assert found.path.read_bytes() == b"wanted"
    assert found.path.exists()
    assert not await artifacts.remove(digest, in_use=lambda: True)
    assert found.path.exists()


async def _gone(artifacts: ArtifactCache, digest: str, in_use: Any) -> None:
    assert await artifacts.remove(digest, in_use=in_use)
