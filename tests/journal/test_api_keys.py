"""API keys in the journal: the first is an administrator's, a deleted one stays deleted, also over a restore."""

from __future__ import annotations

from datetime import timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from tests.journal.kit import Bench, ClockHost, running
from tests.journal.test_backup import keeping, restore
from volant.host import Host
from volant.journal import AddKey, AddProject, Evidence, NoteKeyUses, RemoveKey, RotateKey, restore_offline
from volant.journal._api_keys import requires_keys
from volant.model import ApiKey, CreateApiKey, CreateProject, KeyUse, Problem, Role, RotateApiKey, key_view


def digest(secret: str) -> str:
    return sha256(secret.encode()).hexdigest()


async def add(bench: Bench, name: str, role: Role = Role.ADMIN, *, settings_key: bool = False, **more: Any) -> ApiKey:
    request = CreateApiKey(name=name, role=role, **more)
    key_id = digest(f"id of {name}")[:32]
    return await bench.ask(AddKey(request, digest(name), key_id, "uid 0", settings_key))


def is_closed(bench: Bench) -> bool:
    return bench.store.keys.required


async def refused(bench: Bench, message: AddKey | RemoveKey | RotateKey) -> Problem:
    with pytest.raises(Problem) as problem:
        await bench.ask(message)
    return problem.value


async def test_the_first_key_is_an_administrators_and_closes_tcp_for_good(path: Path) -> None:
    async with running(path) as bench:
        with pytest.raises(Problem) as problem:
            await add(bench, "ci", Role.OPERATOR)
        assert (problem.value.status, problem.value.code) == (409, "first-key-not-admin")
        assert not is_closed(bench)
        await add(bench, "ops")
        assert is_closed(bench)
        with pytest.raises(Problem) as nowhere:
            await add(bench, "ci", Role.OPERATOR, project="web")
        assert nowhere.value.code == "project-not-found"
        await bench.ask(AddProject(CreateProject(name="web")))
        ci = await add(bench, "ci", Role.OPERATOR, project="web")
        assert bench.store.keys.find(digest("ci")) == ci
    async with running(path) as bench:
        assert is_closed(bench)
        assert bench.store.keys.find(digest("ci")) == ci
        assert (ci.project, bench.store.keys.of("ops")[0].project) == ("web", None)


async def test_with_a_key_in_the_settings_the_first_one_may_be_anybodys(path: Path) -> None:
    async with running(path) as bench:
        await add(bench, "ci", Role.VIEWER, settings_key=True)
        await bench.ask(RemoveKey("ci", True))
        # It was closed, and a deletion opens nothing.
        assert is_closed(bench)
    async with running(path) as bench:
        assert is_closed(bench)


async def test_the_last_administrators_key_can_be_replaced_but_not_deleted(path: Path) -> None:
    async with running(path, host=(host := ClockHost())) as bench:
        await add(bench, "ops")
        await add(bench, "ci", Role.OPERATOR)
        problem = await refused(bench, RemoveKey("ops", False))
        assert (problem.status, problem.code) == (409, "last-administrator")
        await bench.ask(RotateKey("ops", RotateApiKey(), digest("new"), "uid 0"))
        await add(bench, "short", expires_in_s=60)
        # Both are administrators'; after a minute it is one again.
        host.pass_time(seconds=61)
        assert (await refused(bench, RemoveKey("ops", False))).code == "last-administrator"
        await bench.ask(RemoveKey("short", False))
        await add(bench, "other")
        await bench.ask(RemoveKey("ops", False))
        assert bench.store.keys.names() == ["ci", "other"]


async def test_a_replaced_key_lasts_as_long_as_the_overlap(path: Path) -> None:
    async with running(path, host=(host := ClockHost())) as bench:
        first = await add(bench, "ops", expires_in_s=3600)
        now = host.clock.now()
        second = await bench.ask(RotateKey("ops", RotateApiKey(overlap_s=600), digest("second"), "uid 0"))
        assert (second.id, second.role, second.expires_at) == (first.id, first.role, None)
        old = bench.store.keys.find(digest("ops"))
        assert old is not None
        assert (old.replaced, old.expires_at) == (True, now + timedelta(seconds=600))
        shown = key_view(bench.store.keys.of("ops"), now)
        assert [each.expires_at for each in shown.replaced] == [old.expires_at]
        # A longer overlap than the key would have lasted prolongs nothing.
        third = await bench.ask(RotateKey("ops", RotateApiKey(overlap_s=60, expires_in_s=90), digest("3"), "uid 0"))
        await bench.ask(RotateKey("ops", RotateApiKey(overlap_s=6000), digest("4"), "uid 0"))
        assert third.expires_at is not None
        kept = bench.store.keys.find(digest("3"))
        assert kept is not None
        assert kept.expires_at == third.expires_at
        # Without an overlap all earlier ones end at once.
        await bench.ask(RotateKey("ops", RotateApiKey(), digest("5"), "uid 0"))
        assert set(bench.store.keys.by_digest) == {digest("5")}


async def test_a_name_is_given_once_and_unknown_ones_are_404(path: Path) -> None:
    async with running(path) as bench:
        await add(bench, "ops")
        with pytest.raises(Problem) as problem:
            await add(bench, "ops")
        assert (problem.value.status, problem.value.code) == (409, "key-exists")
        assert (await refused(bench, RemoveKey("none", False))).status == 404
        assert (await refused(bench, RotateKey("none", RotateApiKey(), digest("x"), "uid 0"))).status == 404
        with pytest.raises(Problem, match="sees every project"):
            await add(bench, "more", project="web")


async def test_uses_are_noted_and_wake_nobody(path: Path) -> None:
    async with running(path) as bench:
        key = await add(bench, "ops")
        use = KeyUse(key.created_at + timedelta(minutes=1), "192.0.2.1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.store.keys.changed)
            await trio.testing.wait_all_tasks_blocked()
            await bench.ask(NoteKeyUses({digest("ops"): use, digest("gone"): use}))
            await trio.testing.wait_all_tasks_blocked()
            assert nursery.child_tasks
            nursery.cancel_scope.cancel()
    async with running(path) as bench:
        found = bench.store.keys.find(digest("ops"))
        assert found is not None
        assert found.used == use
        assert len(bench.store.keys.by_digest) == 1


async def test_no_key_comes_back_from_a_backup(path: Path, tmp_path: Path) -> None:
    kept = tmp_path / "kept.db"
    async with keeping(path) as bench:
        await add(bench, "ops")
        await add(bench, "stolen")
        await bench.backup(kept)
        await bench.ask(RemoveKey("stolen", False))
        newer = await add(bench, "newer")
    restore(path, kept)
    async with keeping(path) as bench:
        assert bench.store.keys.names() == ["newer", "ops"]
        assert bench.store.keys.find(digest("newer")) == newer
        assert is_closed(bench)


@pytest.mark.parametrize("closed_in", ["the backup", "the present database"])
async def test_a_restore_does_not_open_tcp(path: Path, tmp_path: Path, closed_in: str) -> None:
    kept, other = tmp_path / "kept.db", tmp_path / "other/volant.db"
    other.parent.mkdir()
    async with keeping(other) as bench:
        if closed_in == "the backup":
            await add(bench, "ops")
        await bench.backup(kept)
    async with keeping(path) as bench:
        if closed_in != "the backup":
            await add(bench, "ops")
    restore(path, kept)
    async with keeping(path) as bench:
        assert is_closed(bench)
        assert bench.store.keys.names() == ([] if closed_in == "the backup" else ["ops"])


async def test_a_damaged_database_is_not_restored_to_one_that_needs_no_key(path: Path, tmp_path: Path) -> None:
    async with running(tmp_path / "backup.db") as bench:
        await bench.create("demo")
    async with running(path) as bench:
        await add(bench, "ops")
    damage(path)
    restore_offline(Host(), path, tmp_path / "backup.db", Evidence(), "0" * 10, replace=True)
    assert requires_keys(path)


def damage(path: Path) -> None:
    """Overwrites a database that nobody uses."""
    path.write_bytes(b"\0" * 8192)
    for left in ("-wal", "-shm"):
        path.with_name(path.name + left).unlink(missing_ok=True)
