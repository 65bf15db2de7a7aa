"""One VM's resolver: what it answers, asks, caches and remembers. `tests/network/test_egress.py` has real sockets."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio
from hypothesis import given, strategies as st

from volant.egress._messages import (
    Answer,
    MalformedMessage,
    Query,
    Truncated,
    answer,
    denial,
    question,
    read_answer,
    read_query,
)
from volant.egress._resolver import IN_FLIGHT, Resolver
from volant.egress._resolvers import VmResolvers
from volant.egress._sockets import DnsListener
from volant.egress._upstream import NoAnswer, Upstream
from volant.model import parse_egress_texts
from volant.network import EgressGuest, NetworkFailed

T = TypeVar("T")
FIRST = "45.0.0.1"


class Server:
    """A DNS server in memory. `answers`: what it sends to a question, in order; None: nothing."""

    def __init__(self, **answers: Any) -> None:
        self.answers = answers
        self.asked: list[str] = []

    async def listen(self, address: str) -> DnsListener:
        raise AssertionError

    async def ask(self, server: str, question: bytes, accept: Callable[[bytes], T | None], *, tcp: bool = False) -> T:
        query = dns.message.from_wire(question)
        name = query.question[0].name.to_text(omit_final_dot=True)
        self.asked.append(f"{server} {name}{' tcp' if tcp else ''}")
        await trio.lowlevel.checkpoint()
        found = self.answers.get(name.partition(".")[0])
        if isinstance(found, BaseException):
            raise found
        for each in found if isinstance(found, list) else [found]:
            if each is not None and (accepted := accept(each(query))) is not None:
                return accepted
        await trio.sleep_forever()
        raise AssertionError


def records(*addresses: str, ttl: int = 300, cname: str = "") -> Callable[[Any], bytes]:
    def reply(query: Any) -> bytes:
        made = dns.message.make_response(query)
        owner = query.question[0].name.to_text()
        if cname:
            made.answer.append(dns.rrset.from_text(owner, ttl, "IN", "CNAME", cname))
            owner = cname
        if addresses:
            made.answer.append(dns.rrset.from_text(owner, ttl, "IN", "A", *addresses))
        return made.to_wire()

    return reply


class Bench:
    """A resolver, and what it allows."""

    def __init__(self, server: Server, *rules: str) -> None:
        self.allowed: list[tuple[str, dict[str, float]]] = []
        self.refuses = False
        guest = EgressGuest(vm_id=1, egress=parse_egress_texts(rules), gateway="10.0.0.1", address="10.0.0.2")
        self.resolver = Resolver(guest, Upstream(server, ("192.0.2.53", "192.0.2.54")), self._allow)

    async def _allow(self, vm_id: int, name: str, addresses: Mapping[str, float]) -> None:
        if self.refuses:
            raise NetworkFailed("egress", "no")
        self.allowed.append((name, dict(addresses)))

    async def ask(self, name: str, kind: str = "A") -> Any:
        query = read_query(dns.message.make_query(name, kind, use_edns=0).to_wire())
        said = self.resolver.answer_now(query, tcp=False)
        if said is None:
            replies: list[bytes] = []

            async def send(data: bytes) -> None:
                replies.append(data)

            await self.resolver.answer_later(query, send, tcp=False)
            (said,) = replies
        return dns.message.from_wire(said)

    async def addresses(self, name: str) -> list[str]:
        reply = await self.ask(name)
        return [record.to_text() for rrset in reply.answer for record in rrset] or [dns.rcode.to_text(reply.rcode())]


async def test_an_allowed_name_is_resolved_allowed_and_cached(autojump_clock: trio.testing.MockClock) -> None:
    server = Server(a=records(FIRST, ttl=300))
    bench = Bench(server, "a.example:443")
    assert await bench.addresses("A.Example.") == [FIRST]
    assert bench.allowed == [("a.example", {FIRST: 310})]
    await trio.sleep(100)
    reply = await bench.ask("a.example")
    assert 190 <= reply.answer[0].ttl <= 200
    assert len(server.asked) == 1
    await trio.sleep(250)
    await bench.ask("a.example")
    assert len(server.asked) == 2


async def test_a_denied_name_is_remembered_with_its_reason_and_asked_of_nobody() -> None:
    server = Server()
    bench = Bench(server, "a.example")
    for _ in range(2):
        reply = await bench.ask("evil.example")
    assert reply.rcode() == dns.rcode.NXDOMAIN
    assert "no egress rule" in str(reply.options[0])
    assert server.asked == []
    (denied,) = bench.resolver.denied.values()
    assert (denied.name, denied.count, denied.why) == ("evil.example", 2, "no egress rule of the VM allows it")


async def test_what_is_remembered_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(Server(), "*.example")
    bench.resolver._upstream = Upstream(_Anything(), ("192.0.2.53",))
    for number in range(400):
        await bench.ask(f"n{number}.example")
        await bench.ask(f"n{number}.evil")
    assert len(bench.resolver._cache) == 256
    assert len(bench.resolver.denied) == 32
    assert bench.resolver.denied_count == 400


class _Anything(Server):
    async def ask(self, server: str, question: bytes, accept: Callable[[bytes], T | None], *, tcp: bool = False) -> T:
        await trio.lowlevel.checkpoint()
        found = accept(records(FIRST)(dns.message.from_wire(question)))
        assert found is not None
        return found


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "127.0.0.1", "169.254.169.254", "192.168.1.1", "172.16.0.1", "100.64.0.1", "0.0.0.0",
     "224.0.0.1", "255.255.255.255", "240.0.0.1", "198.18.0.1", "192.0.2.1"],
)  # fmt: skip
async def test_an_address_that_is_not_public_needs_a_rule(address: str) -> None:
    bench = Bench(Server(a=records(address)), "a.example")
    assert await bench.addresses("a.example") == ["NXDOMAIN"]
    assert bench.allowed == []
    bench = Bench(Server(a=records(address, FIRST)), "a.example", f"{address}/32:80")
    assert set(await bench.addresses("a.example")) == {address, FIRST}
    assert [addresses.keys() for _, addresses in bench.allowed] == [{FIRST}], "the rule for the network has ports"


async def test_an_answer_is_given_only_when_its_addresses_are_allowed() -> None:
    bench = Bench(Server(a=records(FIRST)), "a.example")
    bench.refuses = True
    assert await bench.addresses("a.example") == ["SERVFAIL"]


async def test_a_guest_does_not_learn_of_the_host_why_a_name_fails(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    bench = Bench(Server(a=records("10.1.2.3"), b=OSError(111, "refused"), c=records(FIRST)), "*.example")
    bench.refuses = True
    sent = {name: str((await bench.ask(f"{name}.example")).options[0]) for name in "abc"}
    assert all("the VM may reach" in text or "can't be resolved now" in text for text in sent.values()), sent
    assert [denied.why for denied in bench.resolver.denied.values()] == [
        "it leads to 10.1.2.3, which is not public, and no `cidr` rule allows it",
        "the DNS server 192.0.2.54: [Errno 111] refused",
        "no",
    ]
    assert caplog.messages == ["VM 1: a name can't be resolved: the DNS server 192.0.2.54: [Errno 111] refused"]


async def test_the_next_server_is_asked_if_one_fails(autojump_clock: trio.testing.MockClock) -> None:
    class Half(Server):
        async def ask(
            self, server: str, question: bytes, accept: Callable[[bytes], T | None], *, tcp: bool = False
        ) -> T:
            if server == "192.0.2.53":
                self.asked.append(server)
                await trio.sleep_forever()
            return await super().ask(server, question, accept, tcp=tcp)

    server = Half(a=records(FIRST))
    assert await Bench(server, "a.example").addresses("a.example") == [FIRST]
    assert server.asked == ["192.0.2.53", "192.0.2.54 a.example"]
    silent = Server()
    assert await Bench(silent, "a.example").addresses("a.example") == ["SERVFAIL"]


async def test_at_most_sixteen_questions_wait(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(Server(), "*.example")
    async with trio.open_nursery() as nursery:
        for number in range(IN_FLIGHT):
            nursery.start_soon(bench.ask, f"n{number}.example")
        await trio.testing.wait_all_tasks_blocked()
        assert (await bench.ask("more.example")).rcode() == dns.rcode.SERVFAIL
        assert (await bench.ask("other.evil")).rcode() == dns.rcode.NXDOMAIN


async def test_a_question_counts_for_its_time_also_if_the_guest_has_left(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench(Server(a=records(FIRST)), "a.example")
    query = read_query(dns.message.make_query("a.example", "A").to_wire())

    async def reset(data: bytes) -> None:
        raise trio.BrokenResourceError

    began = trio.current_time()
    with pytest.raises(trio.BrokenResourceError):
        await bench.resolver.answer_later(query, reset, tcp=True)
    assert trio.current_time() - began == 0.25


async def test_chains_of_cnames_are_followed_to_an_end(autojump_clock: trio.testing.MockClock) -> None:
    server = Server(
        a=records(cname="b.far."), b=records(cname="c.far.", ttl=7), c=records(FIRST), loop=records(cname="loop.far.")
    )
    upstream = Upstream(server, ("192.0.2.53",))
    assert await upstream.resolve("a.example") == Answer((FIRST,), 7, None, True)
    with pytest.raises(NoAnswer, match="chain"):
        await upstream.resolve("loop.example")
    assert len(server.asked) < 20


def test_names_that_look_like_others_are_not_plain() -> None:
    for name in (r"x\.www.example", r"a\000b.example", r"a\032b.example", "."):
        assert not read_query(dns.message.make_query(name, "A").to_wire()).is_plain, name
    assert read_query(dns.message.make_query("_x-1.Example.", "A").to_wire()).is_plain


@given(st.binary(max_size=600))
def test_no_bytes_break_the_parser(data: bytes) -> None:
    for read in (read_query, lambda data: read_answer(question("a.example"), data)):
        try:
            read(data)
        except (MalformedMessage, Truncated):
            pass


@given(st.data())
def test_no_change_of_a_message_breaks_the_parser(data: st.DataObject) -> None:
    asked = question("a.example")
    query = dns.message.from_wire(asked)
    for wire, read in (
        (asked, read_query),
        (records(FIRST, "45.0.0.2", cname="b.example.")(query), lambda changed: read_answer(asked, changed)),
    ):
        changed = bytearray(wire)
        for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(wire) - 1), st.integers(0, 255)), max_size=6)):
            changed[at] = byte
        try:
            found = read(bytes(changed))
        except (MalformedMessage, Truncated):
            continue
        if isinstance(found, Query):
            # What can be read can be answered.
            denial(found, "why")
            answer(found, Answer((FIRST,), 60), tcp=False)


def test_an_answer_to_another_question_is_refused() -> None:
    asked = question("a.example")
    query = dns.message.from_wire(asked)
    assert read_answer(asked, records(FIRST)(query)).addresses == (FIRST,)
    with pytest.raises(MalformedMessage):
        read_answer(asked, bytes([asked[0] ^ 1]) + records(FIRST)(query)[1:])
    other = dns.message.make_query("b.example", "A", id=query.id)
    with pytest.raises(MalformedMessage):
        read_answer(asked, records(FIRST)(other))
    with pytest.raises(MalformedMessage):
        read_answer(asked, asked)


class Listener:
    """Sockets in memory: the datagrams of a guest, and the answers to it."""

    port = 5300

    def __init__(self) -> None:
        self.closed = False
        self.failure: OSError | None = None
        self.woken = trio.Event()
        self.queries: list[bytes] = []
        self.sent: list[bytes] = []
        self.connect: Callable[[], trio.abc.Stream] | None = None

    async def receive(self) -> tuple[bytes, tuple[str, int]]:
        while not self.queries:
            await self.woken.wait()
            if self.closed:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if (failure := self.failure) is not None:
                self.failure = None
                raise failure
            self.woken = trio.Event()
        return self.queries.pop(), ("10.0.0.2", 1000)

    def take(self, data: bytes) -> None:
        self.queries.append(data)
        self.woken.set()

    async def send(self, data: bytes, to: tuple[str, int]) -> None:
        self.sent.append(data)

    async def accept(self) -> tuple[trio.abc.Stream, tuple[str, int]]:
        await trio.lowlevel.checkpoint()
        if self.connect is None:
            await trio.sleep_forever()
        assert self.connect is not None
        return self.connect(), ("10.0.0.2", 1000)

    def close(self) -> None:
        self.closed = True


class Listening(Server):
    """Gives each resolver sockets in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[tuple[str, Listener]] = []

    async def listen(self, address: str) -> DnsListener:
        self.opened.append((address, Listener()))
        return self.opened[-1][1]


def resolvers_with(sockets: Listening) -> VmResolvers:
    async def allow(vm_id: int, name: str, addresses: Mapping[str, float]) -> None:
        raise AssertionError

    return VmResolvers(sockets, ("192.0.2.53",), allow)


def behind_passt(vm_id: int) -> EgressGuest:
    return EgressGuest(vm_id=vm_id, egress="none", gateway="10.0.0.1", user=90000 + vm_id)


async def test_resolvers_open_once_for_a_guest_and_close() -> None:
    sockets = Listening()
    resolvers = resolvers_with(sockets)
    async with trio.open_nursery() as nursery:
        await nursery.start(resolvers.keep)
        for _ in range(2):
            assert await resolvers.open(behind_passt(1)) == 5300
        ((address, listener),) = sockets.opened
        assert address == "127.0.0.1"
        resolvers.close(1)
        resolvers.close(1)
        await trio.testing.wait_all_tasks_blocked()
        assert listener.closed
        nursery.cancel_scope.cancel()


async def test_a_resolver_that_is_not_served_closes_its_sockets_too() -> None:
    sockets = Listening()
    resolvers = resolvers_with(sockets)
    await resolvers.open(behind_passt(1))
    resolvers.close(1)
    assert sockets.opened[0][1].closed


async def test_a_resolver_that_ends_or_fails_harms_no_other(autojump_clock: trio.testing.MockClock) -> None:
    sockets = Listening()
    resolvers = resolvers_with(sockets)
    async with trio.open_nursery() as nursery:
        await nursery.start(resolvers.keep)
        for vm_id in (1, 2):
            await resolvers.open(behind_passt(vm_id))
        first, second = (listener for _, listener in sockets.opened)
        await trio.testing.wait_all_tasks_blocked()
        # Its task is woken, and runs only after that.
        first.woken.set()
        resolvers.close(1)
        second.failure = OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        second.woken.set()
        await trio.sleep(10)
        assert first.closed
        second.take(dns.message.make_query("a.example", "A").to_wire())
        await trio.sleep(1)
        (reply,) = second.sent
        assert dns.message.from_wire(reply).rcode() == dns.rcode.NXDOMAIN
        nursery.cancel_scope.cancel()


class Connection(trio.abc.Stream):
    """A guest that sends a query again and again, and reads nothing."""

    def __init__(self, query: bytes) -> None:
        self.data = (len(query).to_bytes(2) + query) * 32 if query else b""
        self.answers = 0

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        await trio.lowlevel.checkpoint()
        data, self.data = self.data[:max_bytes], self.data[max_bytes:]
        return data

    async def send_all(self, data: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.answers += 1

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    "query", [b"", dns.message.make_query("a.example", "A", id=7).to_wire()], ids=["nothing", "a query"]
)
async def test_all_connections_of_a_vm_share_its_limit(query: bytes, autojump_clock: trio.testing.MockClock) -> None:
    sockets = Listening()
    connections: list[Connection] = []
    resolvers = resolvers_with(sockets)
    await resolvers.open(behind_passt(1))

    def connect() -> trio.abc.Stream:
        connections.append(Connection(query))
        return connections[-1]

    sockets.opened[0][1].connect = connect
    with trio.move_on_after(10):
        await resolvers.keep()
    done = len(connections) + sum(connection.answers for connection in connections)
    assert 2400 <= done <= 2510
