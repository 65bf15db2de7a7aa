"""A repeated request gets the result of the first one and is carried out once, whatever happened in between."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import apsw
import msgspec
import pytest
import trio

from actors import ActorDown, Request
from actors.testing import kill
from tests.journal.kit import Bench, ClockHost, GatedHost, full_error, running
from tests.names import named
from volant.journal import (
    CommitSteps,
    CreateRow,
    DuplicateRequest,
    EnablePlugin,
    IdempotencyKey,
    InstallPlugin,
    PluginChanged,
    PluginInstalled,
    Refusal,
    Result,
    StaleRow,
    StoredResponse,
    StoreRefusal,
    VmChanged,
    VmCreated,
    _responses,
)
from volant.model import DEFAULT_PROJECT, CreateVm, Manifest, Problem, Status, Step, VmRow

NO = Problem(409, "no", "not now", field="f", hint="later", vm="demo")


def key_of(key: str, request: str = "this") -> IdempotencyKey:
    return IdempotencyKey(key.encode(), request.encode())


def create(name: str, key: str, request: str = "this") -> CreateRow:
    return CreateRow(CreateVm(name=name, cpu_cores=1, memory_mb=128), DEFAULT_PROJECT, key_of(key, request))


def starting(row: VmRow, key: str) -> CommitSteps:
    step = Step(msgspec.structs.replace(row, status=Status.STARTING), "starting")
    return CommitSteps(row.id, row.revision, (step,), key_of(key))


async def repeat(bench: Bench, message: Request[object]) -> Result:
    """Returns the stored result."""
    with pytest.raises(DuplicateRequest) as duplicate:
        await bench.ask(message)
    return duplicate.value.result


async def test_a_repeated_request_gets_the_first_result_and_changes_nothing(path: Path) -> None:
    async with running(path) as bench:
        row = await bench.ask(create("demo", "create"))
        plugin = await bench.ask(InstallPlugin(Manifest(name="p", version="1"), DEFAULT_PROJECT, key_of("plugin")))
        off = await bench.ask(EnablePlugin(named("p"), False, key_of("off")))
        assert await bench.ask(EnablePlugin(named("p"), False, key_of("nothing"))) == off
        changed = await bench.ask(starting(row, "command"))
        assert changed is not None
        assert await bench.ask(CommitSteps(row.id, changed.revision, (), key_of("no command"))) == changed
        expected: list[tuple[Request[object], Result]] = [
            (create("demo", "create"), VmCreated.of(row)),
            (
                InstallPlugin(Manifest(name="p", version="1"), DEFAULT_PROJECT, key_of("plugin")),
                PluginInstalled.of(plugin),
            ),
            (EnablePlugin(named("p"), False, key_of("off")), PluginChanged.of(off)),
            (EnablePlugin(named("p"), False, key_of("nothing")), PluginChanged.of(off)),
            (starting(row, "command"), VmChanged.of(changed)),
            (CommitSteps(row.id, changed.revision, (), key_of("no command")), VmChanged.of(changed)),
        ]
        newest = bench.store.events.newest
        for message, result in expected:
            assert await repeat(bench, message) == result
        assert bench.store.projection.rows() == [changed]
        assert bench.store.events.newest == newest
    # The next daemon knows them too.
    async with running(path) as bench:
        for message, result in expected:
            assert await repeat(bench, message) == result
        assert bench.store.projection.rows() == [changed]


async def test_a_refusal_is_stored_and_a_key_stands_for_one_request(path: Path) -> None:
    async with running(path) as bench:
        await bench.ask(StoreRefusal(Refusal.of(NO), key_of("k")))
        refusal = await repeat(bench, create("demo", "k"))
        assert isinstance(refusal, Refusal)
        assert vars_of(refusal.problem()) == vars_of(NO)
        with pytest.raises(Problem) as reused:
            await bench.ask(create("demo", "k", "that"))
        assert (reused.value.status, reused.value.code) == (422, "idempotency-key-reused")
        assert bench.store.projection.rows() == []
        # Nobody was answered that a row is stale: whoever asked reads it and goes on.
        row = await bench.create("demo")
        with pytest.raises(StaleRow):
            await bench.ask(CommitSteps(row.id, row.revision - 1, (), key_of("v")))
        assert await bench.ask(CommitSteps(row.id, row.revision, (), key_of("v"))) == row


def vars_of(problem: Problem) -> tuple[object, ...]:
    return (problem.status, problem.code, problem.detail, problem.field, problem.hint, problem.vm)


async def in_one_group(bench: Bench, host: GatedHost, messages: list[Request[object]]) -> list[object]:
    """Ask all while a commit is under way, so that the next one has them all; what each is answered or refused with."""
    results: dict[int, object] = {}

    async def ask(number: int) -> None:
        try:
            results[number] = await bench.ask(messages[number])
        except Exception as error:
            results[number] = error

    begun, release = host.hold()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.create, "filler")
        await begun.wait()
        for number in range(len(messages)):
            nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked()
        release()
    return [results[number] for number in range(len(messages))]


async def test_of_duplicates_in_one_transaction_one_is_carried_out(path: Path) -> None:
    host = GatedHost()
    async with running(path, host=host) as bench:
        results = await in_one_group(
            bench, host, [create("demo", "k"), create("demo", "k"), create("other", "k", "that")]
        )
        assert isinstance(results[0], VmRow)
        assert isinstance(results[1], DuplicateRequest)
        assert isinstance(results[2], Problem)
        assert results[2].status == 422
        assert [row.name for row in bench.store.projection.rows()] == ["filler", "demo"]


async def test_a_commit_that_fails_stores_nothing(path: Path) -> None:
    host = GatedHost()
    async with running(path, host=host) as bench:
        host.before = full_error
        with pytest.raises(Problem, match="full"):
            await bench.ask(create("demo", "k"))
        host.before = None
        assert isinstance(await bench.ask(create("demo", "k")), VmRow)


async def test_after_a_crash_between_commit_and_reply_the_result_is_there(path: Path) -> None:
    host = GatedHost()
    async with running(path, host=host) as bench:
        begun, release = host.hold()
        async with trio.open_nursery() as nursery:

            async def unanswered() -> None:
                with pytest.raises(ActorDown):
                    await bench.ask(create("demo", "k"))

            nursery.start_soon(unanswered)
            await begun.wait()
            kill(bench.system, "journal")
            release()
        with trio.fail_after(10):
            while True:
                try:
                    result = await repeat(bench, create("demo", "k"))
                    break
                except ActorDown:
                    await trio.sleep(0.01)
        (row,) = bench.store.projection.rows()
        assert result == VmCreated.of(row)


async def test_stored_responses_are_limited_by_age_number_and_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = ClockHost()
    monkeypatch.setattr(_responses, "MAX_RESPONSES", 3)
    async with running(path, host=host) as bench:

        async def known() -> str:
            assert len(bench.store.responses) == on_disk(path)
            return "".join(
                key for key in "abcdefg" if bench.store.responses.find(key_of(key), host.clock.now()) is not None
            )

        for key in "abcd":
            await bench.ask(create(f"vm-{key}", key))
            host.pass_time(hours=1)
        assert await known() == "bcd"
        # `b` is a day old now, and its key is new again.
        host.pass_time(hours=21)
        assert await known() == "cd"
        assert isinstance(await bench.ask(create("again", "b")), VmRow)
        assert await known() == "bcd"
        size = sum(StoredResponse(key_of("any"), 0, result).size for result in results_on_disk(path))
        assert size == bench.store.responses._sizes.total()
        monkeypatch.setattr(_responses, "MAX_BYTES", size // 3 + 1)
        await bench.ask(create("last", "e"))
        assert await known() == "e"
    async with running(path, host=host) as bench:
        assert isinstance(await repeat(bench, create("last", "e")), VmCreated)


async def test_a_project_makes_room_for_its_own_responses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = ClockHost()
    monkeypatch.setattr(_responses, "MAX_RESPONSES", 6)

    async def store(bench: Bench, project: str, keys: Iterable[str]) -> None:
        for key in keys:
            await bench.ask(StoreRefusal(Refusal.of(NO), IdempotencyKey(key.encode(), b"this", project)))

    def known(bench: Bench) -> str:
        assert len(bench.store.responses) == on_disk(path) == 6
        now = host.clock.now()
        return "".join(key for key in "abcdefgh" if bench.store.responses.find(key_of(key), now) is not None)

    async with running(path, host=host) as bench:
        await store(bench, "quiet", "ab")
        await store(bench, "busy", (f"flood-{number}" for number in range(20)))
        assert known(bench) == "ab"
    # The next daemon knows whose they are.
    async with running(path, host=host) as bench:
        await store(bench, "busy", "cd")
        assert known(bench) == "abcd"
        # Above its share it removes none of the other's.
        await store(bench, "quiet", "efgh")
        assert known(bench) == "cdfgh"


def results_on_disk(path: Path) -> list[bytes]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return [bytes(result) for (result,) in connection.execute("SELECT result FROM responses")]
    finally:
        connection.close()


def on_disk(path: Path) -> int:
    return len(results_on_disk(path))
