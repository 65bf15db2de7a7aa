"""The client of etcd, with real members that are killed, stopped and cut off."""

from __future__ import annotations

import random
import re
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.fleet.cluster import Cluster, Member, administer, cluster, needs_etcd
from tests.simulated.etcd import SimulatedEtcd
from volant.fleet import (
    Compacted,
    Etcd,
    EtcdError,
    EtcdRefused,
    EtcdSettings,
    EtcdUnavailable,
    KeyValues,
    LeaseGone,
    Mirror,
    Namespace,
    OutcomeUnknown,
    absent,
    delete,
    equal,
    fetch,
    open_etcd,
    put,
    unchanged,
)

pytestmark = [needs_etcd, pytest.mark.slow]
LONG_S = 60.0


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A cluster of one member, whose keys all tests share."""
    with cluster(tmp_path_factory.mktemp("etcd")) as found:
        trio.run(found.ready)
        yield found


@pytest.fixture(params=["real", "simulated"])
async def etcd(one: Cluster, request: pytest.FixtureRequest) -> AsyncIterator[KeyValues]:
    """A real one, and the one of the simulation, which must not promise more."""
    if request.param == "real":
        async with open_etcd(one.settings()) as client:
            yield client
    else:
        async with trio.open_nursery() as nursery:
            simulated = SimulatedEtcd(random.Random(1))
            nursery.start_soon(simulated.run)
            yield simulated
            nursery.cancel_scope.cancel()


async def compact(one: Cluster, etcd: KeyValues, revision: int) -> None:
    if isinstance(etcd, SimulatedEtcd):
        etcd.compact(revision)
    else:
        await administer(one.members[0], "kv/compaction", revision=str(revision))


async def test_a_transaction_does_all_or_nothing(etcd: KeyValues) -> None:
    assert await etcd.get("a/x") is None
    value = bytes(range(256))
    made = await etcd.transact([absent("a/x"), absent("a/y")], [put("a/x", value), put("a/y", b"")])
    assert made.done
    x = await etcd.get("a/x")
    assert x is not None
    assert (x.value, x.created, x.modified) == (value, made.revision, made.revision)
    again = await etcd.transact([absent("a/x")], [put("a/x", b"2")], [fetch("a/x"), fetch("a/none")])
    assert (again.done, again.reads) == (False, (x, None))
    assert (await etcd.transact([unchanged(x), equal("a/y", b"")], [put("a/x", b"3"), delete("a/y")])).done
    assert not (await etcd.transact([unchanged(x)], [put("a/x", b"4")])).done
    entries, _ = await etcd.list("a/")
    assert [(entry.key, entry.value) for entry in entries] == [("a/x", b"3")]


async def test_one_of_many_gets_a_name(one: Cluster) -> None:
    winners: list[int] = []

    async def claim(number: int) -> None:
        async with open_etcd(one.settings()) as client:
            if (await client.transact([absent("name/web")], [put("name/web", b"%d" % number)])).done:
                winners.append(number)

    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(claim, number)
    async with open_etcd(one.settings()) as client:
        found = await client.get("name/web")
    assert found is not None
    assert [b"%d" % winner for winner in winners] == [found.value]


async def test_values_that_are_large_together_come_in_parts(one: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("_etcd", "_watch"):
        monkeypatch.setattr(f"volant.fleet.{module}.MAX_ANSWER", 100_000)
    async with open_etcd(one.settings()) as client:
        before = await client.transact([], [put("large/first", b"")])
        for number in range(30):
            await client.transact([], [put(f"large/{number:02}", bytes(10_000))])
        entries, _ = await client.list("large/")
        assert [len(entry.value) for entry in entries] == [10_000] * 30 + [0]
        # All of them since then would be one line.
        async with client.watch("large/", after=before.revision) as watch:
            with pytest.raises(Compacted), trio.fail_after(LONG_S):  # noqa: PT012
                while True:
                    await watch.receive()


async def test_a_list_is_of_one_revision_and_has_no_limit(etcd: KeyValues) -> None:
    for first in range(0, 1200, 100):
        await etcd.transact([], [put(f"many/{number:04}", b"v") for number in range(first, first + 100)])
    entries, revision = await etcd.list("many/")
    assert [entry.key for entry in entries] == [f"many/{number:04}" for number in range(1200)]
    assert revision >= max(entry.modified for entry in entries)
    assert (await etcd.list("man"))[0] == entries
    assert (await etcd.list("many/9"))[0] == []


async def test_a_lease_ends_with_its_keys(etcd: KeyValues) -> None:
    lease = await etcd.grant(2)
    await etcd.transact([], [put("alive/h1", b"", lease=lease.id)])
    assert await etcd.keep_alive(lease.id) == lease.ttl_s
    async with etcd.watch("alive/", after=(await etcd.list("alive/"))[1]) as watch:
        with trio.fail_after(LONG_S):
            (change,) = (await watch.receive()).changes
    assert (change.key, change.entry) == ("alive/h1", None)
    with pytest.raises(LeaseGone):
        await etcd.keep_alive(lease.id)
    with pytest.raises(LeaseGone):
        await etcd.transact([], [put("alive/h1", b"", lease=lease.id)])
    await etcd.revoke(lease.id)
    other = await etcd.grant(60)
    await etcd.transact([], [put("alive/h2", b"", lease=other.id)])
    await etcd.revoke(other.id)
    assert await etcd.get("alive/h2") is None


async def test_a_watch_reports_each_revision_and_goes_on_where_one_ended(etcd: KeyValues) -> None:
    start = (await etcd.transact([], [put("w/a", b"1")])).revision
    async with etcd.watch("w/", after=start) as watch:
        await etcd.transact([], [put("w/a", b"2"), put("w/b", b"1"), put("other", b"")])
        first = await watch.receive()
        assert [(change.key, change.entry and change.entry.value) for change in first.changes] == [
            ("w/a", b"2"), ("w/b", b"1"),
        ]  # fmt: skip
    last = (await etcd.transact([], [delete("w/a")])).revision
    async with etcd.watch("w/", after=first.revision) as watch:
        second = await watch.receive()
    assert ([(change.key, change.entry) for change in second.changes], second.revision) == ([("w/a", None)], last)


async def test_a_watch_after_a_compaction_says_that_changes_are_missing(one: Cluster, etcd: KeyValues) -> None:
    start = (await etcd.transact([], [put("c/a", b"1")])).revision
    last = (await etcd.transact([], [put("c/a", b"2")])).revision
    last = (await etcd.transact([], [put("c/a", b"3")])).revision
    await compact(one, etcd, last)
    with pytest.raises(Compacted):
        async with etcd.watch("c/", after=start) as watch:
            await watch.receive()
    # After a restore of etcd revisions are lower, and a watch would be silent until they are reached again.
    with pytest.raises(Compacted):
        async with etcd.watch("c/", after=last + 1000):
            pass


async def test_what_is_too_large_is_refused(etcd: KeyValues) -> None:
    with pytest.raises(EtcdRefused, match="too large"):
        await etcd.transact([], [put("large", bytes(2_000_000))])
    with pytest.raises(EtcdRefused, match="too many operations"):
        await etcd.transact([], [put(f"o/{number}", b"") for number in range(200)])


async def test_a_client_signs_in_again_when_its_token_has_ended(tmp_path: Path) -> None:
    with cluster(tmp_path) as own:
        await own.ready()
        member = own.members[0]
        await enable_users(member)
        async with open_etcd(own.settings()) as nobody:
            with pytest.raises(EtcdRefused):
                await nobody.get("a")
        async with open_etcd(own.settings(user="root", password="wrong")) as wrong:
            with pytest.raises(EtcdRefused, match="authentication failed"):
                await wrong.get("a")
        async with open_etcd(own.settings(user="root", password="pw")) as client:
            assert await client.get("a") is None
            # Its tokens are in memory.
            member.kill()
            member.start()
            with trio.fail_after(LONG_S):
                while True:
                    try:
                        assert (await client.transact([], [put("a", b"")])).done
                        break
                    except (EtcdUnavailable, OutcomeUnknown):
                        await trio.sleep(0.05)


@pytest.mark.full
async def test_a_token_from_before_a_restore_blocks_nobody_for_long(tmp_path: Path) -> None:
    """etcd waits for the change at which a token was given, which it has not before it in a restored backup."""
    with cluster(tmp_path) as own:
        await own.ready()
        await enable_users(own.members[0])
        async with open_etcd(own.settings(user="root", password="pw"), deadline_s=1) as client:
            asks: list[Callable[[], Awaitable[object]]] = [partial(client.get, "a"), partial(begin_watch, client)]
            for ask in asks:
                client._token = "AAAAAAAAAAAAAAAA.999999999"
                with trio.fail_after(LONG_S):
                    while True:
                        try:
                            await ask()
                            break
                        except EtcdUnavailable:
                            continue


@pytest.mark.parametrize("of", ["read", "watch"])
async def test_a_token_that_is_never_answered_is_replaced_for_the_next_request(
    of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that was restored from a backup treats an old token like this."""
    asked: list[str] = []

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            head = await _head_of_request(stream)
            token = head.partition("authorization: ")[2].partition("\r\n")[0]
            asked.append(token)
            if token == "old":
                await trio.sleep_forever()
            line = '{"header":{"revision":"7"}}' if token else '{"token":"new"}'
            if "/v3/watch" in head:
                line = f'{{"result":{line}}}\n'
            answer = f"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {len(line)}\r\n\r\n{line}"
            await stream.send_all(answer.encode())

    async with _serving(handle) as url:
        settings = EtcdSettings(endpoints=(url,), user="root", password="pw")
        async with open_etcd(settings, deadline_s=0.2) as client:
            ask = partial(client.get, "a") if of == "read" else partial(begin_watch, client)
            monkeypatch.setattr("volant.fleet._watch._BEGIN_S", 0.2)
            # On a busy machine, it may be too late before it is sent.
            while "old" not in asked:
                client._token = "old"
                with pytest.raises(EtcdUnavailable):
                    await ask()
            monkeypatch.setattr("volant.fleet._watch._BEGIN_S", LONG_S)
            client._deadline_s = LONG_S
            await ask()
            assert [token for token in asked if token != "old"] == ["", "new"]


async def test_a_member_that_is_gone_is_passed_over(one: Cluster) -> None:
    settings = EtcdSettings(endpoints=("http://127.0.0.1:9", *one.settings().endpoints))
    # Each client asks that one first.
    async with open_etcd(settings) as client:
        assert await client.get("next/a") is None
    async with open_etcd(settings) as client:
        assert (await client.transact([absent("next/a")], [put("next/a", b"1")])).done
        found = await client.get("next/a")
        assert found is not None
        assert found.value == b"1"
    async with open_etcd(settings) as client:
        with pytest.raises(EtcdUnavailable, match="can't be reached"):
            await begin_watch(client)
        await begin_watch(client)


async def begin_watch(etcd: Etcd) -> None:
    async with etcd.watch("a", after=0):
        pass


async def enable_users(member: Member) -> None:
    await administer(member, "auth/user/add", name="root", password="pw")
    await administer(member, "auth/role/add", name="root")
    await administer(member, "auth/user/grant", user="root", role="root")
    await administer(member, "auth/enable")


async def test_over_tls_both_sides_show_a_certificate(tmp_path: Path) -> None:
    with cluster(tmp_path, tls=True) as own:
        await own.ready()
        async with open_etcd(own.settings()) as client:
            assert (await client.transact([], [put("a", b"1")])).done
        bare = EtcdSettings(endpoints=own.settings().endpoints)
        async with open_etcd(bare) as stranger:
            with pytest.raises(EtcdError, match=r"(?i)certificate"):
                await stranger.get("a")


@pytest.mark.full
async def test_members_are_lost_and_come_back(tmp_path: Path) -> None:
    """A mirror has no hole afterwards, and each change is done, not done, or of an unknown outcome."""
    with cluster(tmp_path, 3) as own:
        await own.ready()
        async with open_etcd(own.settings()) as client, trio.open_nursery() as nursery:
            mirror = Mirror(Namespace(client, "f/"), trio.current_time)
            await nursery.start(mirror.keep)
            await client.transact([], [put("f/k/a", b"1")])
            await _until(mirror, lambda: "a" in mirror.section("k"))
            # The others go on without one.
            own.members[0].kill()
            with trio.fail_after(LONG_S):
                await _done(client, "f/k/b")
            await _until(mirror, lambda: "b" in mirror.section("k") and mirror.trouble is None)
            # Without a quorum nothing hangs.
            own.members[1].send(signal.SIGSTOP)
            with trio.fail_after(LONG_S):
                await _fails(lambda: client.transact([], [put("f/k/c", b"1")]))
                await _fails(lambda: client.get("f/k/a"))
            await _until(mirror, lambda: mirror.trouble is not None)
            assert set(mirror.section("k")) >= {"a", "b"}
            assert mirror.age_s is not None
            own.members[1].send(signal.SIGCONT)
            own.members[0].start()
            with trio.fail_after(LONG_S):
                await _done(client, "f/k/d")
            await _until(mirror, lambda: "d" in mirror.section("k") and mirror.trouble is None)
            entries, _ = await client.list("f/k/")
            await _until(mirror, lambda: values(mirror) == {entry.key[4:]: entry.value for entry in entries})
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("size", [0, 40])
async def test_a_change_whose_answer_is_lost_has_an_unknown_outcome(one: Cluster, size: int) -> None:
    key = f"lost/{size}"
    async with _cutting(one.members[0].url, size) as url, open_etcd(EtcdSettings(endpoints=(url,))) as client:
        with pytest.raises(OutcomeUnknown):
            await client.transact([], [put(key, b"1")])
        with pytest.raises(EtcdUnavailable):
            await client.get(key)
    async with open_etcd(one.settings()) as client:
        assert await client.get(key) is not None


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nno JSON !",
        b'HTTP/1.1 200 OK\r\nContent-Length: 27\r\n\r\n{"header":{"revision":"x"}}',
        b"HTTP/1.1 500 Oh\r\nContent-Length: 3\r\n\r\nboo",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"100000\r\n" + b"x" * 0x100000 + b"\r\n",
        b"garbage\r\n\r\n",
        b"",
    ],
)
async def test_what_is_no_etcd_is_an_error(answer: bytes) -> None:
    async with _answering(answer) as url, open_etcd(EtcdSettings(endpoints=(url,))) as client:
        with pytest.raises(OutcomeUnknown):
            await client.transact([], [put("a", b"")])
        with pytest.raises(EtcdUnavailable):
            await client.list("a")
        with pytest.raises(EtcdUnavailable):
            async with client.watch("a", after=0) as watch:
                await watch.receive()


async def test_nobody_there_is_told_apart_from_an_unknown_outcome() -> None:
    async with open_etcd(EtcdSettings(endpoints=("http://127.0.0.1:9",))) as client:
        with pytest.raises(EtcdUnavailable, match="can't be reached"):
            await client.transact([], [put("a", b"")])


async def _done(client: Etcd, key: str) -> None:
    """Writes a key, as often as it takes."""
    while True:
        try:
            await client.transact([], [put(key, b"1")])
            return
        except (EtcdUnavailable, OutcomeUnknown):
            await trio.sleep(0.05)


async def _fails(call: Callable[[], Awaitable[object]]) -> None:
    """Repeats a call until it fails, as a quorum is lost some time after its members are."""
    while True:
        try:
            await call()
        except (EtcdUnavailable, OutcomeUnknown):
            return


def values(mirror: Mirror) -> dict[str, bytes]:
    return {key: entry.value for key, entry in mirror.section("k").items()}


async def _until(mirror: Mirror, holds: Callable[[], bool]) -> None:
    with trio.fail_after(LONG_S):
        while not holds():
            await mirror.changed()


async def _head_of_request(stream: trio.SocketStream) -> str:
    """Reads a whole request and returns its head, in lower case."""
    data = b""
    while True:
        head, _, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head.lower())
        if length is not None and len(body) >= int(length[1]):
            return head.decode().lower()
        data += await stream.receive_some()


@asynccontextmanager
async def _serving(handler: Callable[[trio.SocketStream], Any]) -> AsyncIterator[str]:
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, handler, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def _cutting(url: str, size: int) -> AsyncIterator[str]:
    """Passes requests on to a member, and cuts each answer after `size` bytes."""

    async def handle(stream: trio.SocketStream) -> None:
        host, _, port = url.removeprefix("http://").rpartition(":")
        async with await trio.open_tcp_stream(host, int(port)) as member, stream:
            await member.send_all(await stream.receive_some())
            answer = await member.receive_some()
            await stream.send_all(answer[:size])

    async with _serving(handle) as address:
        yield address


@asynccontextmanager
async def _answering(answer: bytes) -> AsyncIterator[str]:
    """Gives the same answer to everything, again and again if it has no end."""

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            try:
                await stream.send_all(answer)
                while b"chunked" in answer:
                    await stream.send_all(answer[answer.index(b"100000") :])
            except trio.BrokenResourceError:
                pass

    async with _serving(handle) as address:
        yield address
