"""A request that comes again is answered from what was committed, whatever happened in between, and is done once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import apsw
import msgspec
import pytest
import trio

from actors import ActorDown, Request
from tests.journal.kit import Bench, ClockHost, GatedHost, running
from volant.journal import (
    AlreadyAnswered,
    Answer,
    CommitSteps,
    CreateRow,
    EnablePlugin,
    InstallPlugin,
    KeepRefusal,
    Once,
    Refusal,
    StaleRow,
    _answers,
)
from volant.model import CreateVm, Manifest, Problem, Status, Step, VmRow

NO = Problem(409, "no", "not now", field="f", hint="later", vm="demo")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "volant.db"


def once(key: str, asked: str = "this") -> Once:
    return Once(key.encode(), asked.encode(), lambda result: Answer(201, {"Key": key}, repr(result), 7))


def create(name: str, key: str, asked: str = "this") -> CreateRow:
    return CreateRow(CreateVm(name=name, cpu_cores=1, memory_mb=128), once(key, asked))


def starting(row: VmRow, key: str) -> CommitSteps:
    step = Step(msgspec.structs.replace(row, status=Status.STARTING), "starting")
    return CommitSteps(row.id, row.revision, (step,), once(key))


async def again(bench: Bench, message: Request[object]) -> Answer | Refusal:
    """What the message was answered with before."""
    with pytest.raises(AlreadyAnswered) as before:
        await bench.ask(message)
    kept = before.value.kept
    found = kept.answer or kept.refusal
    assert found is not None
    return found


async def test_what_was_done_is_answered_again_and_not_done_again(path: Path) -> None:
    async with running(path) as bench:
        asked: dict[str, Request[object]] = {
            "create": create("demo", "create"),
            "plugin": InstallPlugin(Manifest(name="p", version="1"), once("plugin")),
            "off": EnablePlugin("p", False, once("off")),
            "nothing": EnablePlugin("p", False, once("nothing")),
        }
        results = {key: await bench.ask(message) for key, message in asked.items()}
        row = results["create"]
        assert isinstance(row, VmRow)
        asked["verb"] = starting(row, "verb")
        results["verb"] = changed = await bench.ask(asked["verb"])
        assert isinstance(changed, VmRow)
        asked["no verb"] = CommitSteps(row.id, changed.revision, (), once("no verb"))
        results["no verb"] = await bench.ask(asked["no verb"])
        newest = bench.store.events.newest
        for key, message in asked.items():
            assert await again(bench, message) == Answer(201, {"Key": key}, repr(results[key]), 7)
        assert bench.store.projection.rows() == [changed]
        assert bench.store.events.newest == newest
    # The next daemon knows too.
    async with running(path) as bench:
        for key, message in asked.items():
            assert await again(bench, message) == Answer(201, {"Key": key}, repr(results[key]), 7)
        assert bench.store.projection.rows() == [changed]


async def test_a_refusal_is_kept_and_a_key_stands_for_one_request(path: Path) -> None:
    async with running(path) as bench:
        await bench.ask(KeepRefusal(Refusal.of(NO), once("k")))
        refusal = await again(bench, create("demo", "k"))
        assert isinstance(refusal, Refusal)
        assert vars_of(refusal.problem()) == vars_of(NO)
        with pytest.raises(Problem) as reused:
            await bench.ask(create("demo", "k", "that"))
        assert (reused.value.status, reused.value.code) == (422, "idempotency-key-reused")
        assert bench.store.projection.rows() == []
        # Nobody was answered that a row is stale: whoever asked reads it and goes on.
        row = await bench.create("demo")
        with pytest.raises(StaleRow):
            await bench.ask(CommitSteps(row.id, row.revision - 1, (), once("v")))
        assert await bench.ask(CommitSteps(row.id, row.revision, (), once("v"))) == row


def vars_of(problem: Problem) -> tuple[object, ...]:
    return (problem.status, problem.code, problem.detail, problem.field, problem.hint, problem.vm)


async def in_one_group(bench: Bench, host: GatedHost, messages: list[Request[object]]) -> list[object]:
    """Ask all while a commit is under way, so that the next one has them all; what each is answered or refused with."""
    gate, begun, token = threading.Event(), trio.Event(), trio.lowlevel.current_trio_token()

    def hold() -> None:
        token.run_sync_soon(begun.set)
        assert gate.wait(10)

    results: dict[int, object] = {}

    async def ask(number: int) -> None:
        try:
            results[number] = await bench.ask(messages[number])
        except Exception as error:
            results[number] = error

    host.before = hold
    async with trio.open_nursery() as nursery:
        nursery.start_soon(bench.create, "filler")
        await begun.wait()
        host.before = None
        for number in range(len(messages)):
            nursery.start_soon(ask, number)
            await trio.testing.wait_all_tasks_blocked()
        gate.set()
    return [results[number] for number in range(len(messages))]


async def test_of_those_in_one_transaction_one_is_done(path: Path) -> None:
    host = GatedHost()
    async with running(path, host=host) as bench:
        results = await in_one_group(
            bench, host, [create("demo", "k"), create("demo", "k"), create("other", "k", "that")]
        )
        assert isinstance(results[0], VmRow)
        assert isinstance(results[1], AlreadyAnswered)
        assert isinstance(results[2], Problem)
        assert results[2].status == 422
        assert [row.name for row in bench.store.projection.rows()] == ["filler", "demo"]


async def test_a_commit_that_fails_keeps_nothing(path: Path) -> None:
    host = GatedHost()
    async with running(path, host=host) as bench:

        def full() -> None:
            raise apsw.FullError("full")

        host.before = full
        with pytest.raises(Problem, match="full"):
            await bench.ask(create("demo", "k"))
        host.before = None
        assert isinstance(await bench.ask(create("demo", "k")), VmRow)


async def test_a_crash_between_commit_and_answer_is_made_good(path: Path) -> None:
    host, gate = GatedHost(), threading.Event()
    async with running(path, host=host) as bench:
        begun, token = trio.Event(), trio.lowlevel.current_trio_token()

        def hold() -> None:
            token.run_sync_soon(begun.set)
            assert gate.wait(10)

        host.before = hold
        async with trio.open_nursery() as nursery:

            async def unanswered() -> None:
                with pytest.raises(ActorDown):
                    await bench.ask(create("demo", "k"))

            nursery.start_soon(unanswered)
            await begun.wait()
            host.before = None
            bench.system.kill("journal")
            gate.set()
        with trio.fail_after(10):
            while True:
                try:
                    answer = await again(bench, create("demo", "k"))
                    break
                except ActorDown:
                    await trio.sleep(0.01)
        (row,) = bench.store.projection.rows()
        assert answer == Answer(201, {"Key": "k"}, repr(row), 7)


async def test_what_is_kept_is_bounded_by_age_number_and_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = ClockHost()
    monkeypatch.setattr(_answers, "MAX_ANSWERS", 3)
    async with running(path, host=host) as bench:

        async def known() -> str:
            assert len(bench.store.answers) == on_disk(path)
            return "".join(
                key for key in "abcdefg" if bench.store.answers.find(once(key), host.wall_clock()) is not None
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
        size = sum(kept.size for kept in map(msgspec.json.Decoder(_answers.Kept).decode, kept_on_disk(path)))
        assert size == bench.store.answers._bytes
        monkeypatch.setattr(_answers, "MAX_BYTES", size // 3 + 1)
        await bench.ask(create("last", "e"))
        assert await known() == "e"
    async with running(path, host=host) as bench:
        assert isinstance(await again(bench, create("last", "e")), Answer)


def kept_on_disk(path: Path) -> list[bytes]:
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return [bytes(kept) for (kept,) in connection.execute("SELECT kept FROM answers")]  # type: ignore[arg-type]
    finally:
        connection.close()


def on_disk(path: Path) -> int:
    return len(kept_on_disk(path))


async def test_an_older_database_learns_to_keep_answers(path: Path) -> None:
    async with running(path) as bench:
        row = await bench.create("demo")
    connection = apsw.Connection(str(path))
    connection.execute("DROP TABLE answers")
    connection.execute("DROP TABLE snapshots")
    connection.execute("DROP TABLE networks")
    connection.pragma("user_version", 1)
    connection.close()
    async with running(path) as bench:
        assert bench.store.projection.rows() == [row]
        await bench.ask(create("other", "k"))
        await again(bench, create("other", "k"))


CHILD = """
import sys, trio
from pathlib import Path
from tests.journal.kit import running
from tests.journal.test_answers import create
from volant.journal import AlreadyAnswered

async def writer(bench, lane, first):
    for number in range(first, 1_000_000):
        try:
            await bench.ask(create(f"vm-{lane}-{number}", f"{lane}-{number}"))
        except AlreadyAnswered:
            pass
        print(lane, number, flush=True)

async def main():
    async with running(Path(sys.argv[1])) as bench, trio.open_nursery() as nursery:
        for lane in range(4):
            nursery.start_soon(writer, bench, lane, int(sys.argv[2 + lane]))

trio.run(main)
"""


def test_after_kill_9_whoever_asks_again_gets_the_vm_that_was_made(path: Path) -> None:
    answered = [-1] * 4
    for _ in range(3):
        # Each lane asks again for what it has no answer to. A key that was lost would be a name that is taken.
        first = [str(number + 1) for number in answered]
        child = subprocess.Popen([sys.executable, "-c", CHILD, path, *first], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        for count, line in enumerate(child.stdout):
            if not line.endswith("\n"):
                break  # An answer that was cut in half was not received.
            lane, number = map(int, line.split())
            assert number == answered[lane] + 1
            answered[lane] = number
            if count == 100:
                child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()

    async def check() -> None:
        async with running(path) as bench:
            names = [row.name for row in bench.store.projection.rows()]
            assert len(names) == len(bench.store.answers)
            for lane, number in enumerate(answered):
                assert {f"vm-{lane}-{n}" for n in range(number + 1)} <= set(names)

    trio.run(check)
