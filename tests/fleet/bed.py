"""The test bed: three members of etcd and five hosts with real guests, each in a network namespace of its own, and
faults of processes, of the network and of clocks.

Clients and the recorder are outside of all hosts, and reach each of them whatever is cut between hosts.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing, suppress
from pathlib import Path
from random import Random
from tempfile import mkdtemp

import trio

from examples.fleet.lab import HostOfLab, Lab, Node
from tests.fleet.clocks import EARLIER, FURTHEST_S, TimeNamespace, WallClock
from tests.system.kit import cache_dir
from volant.vm import instance_of

HOSTS, MEMBERS = 5, 3
TTL_S = 5
_API, _ETCD, _PROXY = 7777, 2379, 23790
_PIECE = 64 * 1024
_S = 30.0


class Bed:
    """The hosts, and what can go wrong with them. Make it with `bed`."""

    def __init__(self, lab: Lab, nursery: trio.Nursery, random: Random) -> None:
        self.lab = lab
        self.delay_s = 0.0
        """How long the proxy keeps what the last host and etcd send each other."""
        self._nursery = nursery
        self._random = random
        self._commands = {node.name: self._script_of(node).read_text() for node in (*self.members, *self.hosts)}
        """What starts each node, as the lab has written it."""
        self._times: dict[str, TimeNamespace] = {}
        self.wall_clocks = {host.name: WallClock(lab.directory / host.name / "clock") for host in self.hosts}

    def close(self) -> None:
        for times in self._times.values():
            times.close()

    @property
    def hosts(self) -> Sequence[HostOfLab]:
        return self.lab.hosts

    @property
    def members(self) -> Sequence[Node]:
        return self.lab.members

    # Faults. Each holds until its block ends.

    @asynccontextmanager
    async def killed(self, node: Node) -> AsyncIterator[None]:
        """A daemon or a member of etcd is killed, and started again."""
        node.kill()
        try:
            yield
        finally:
            node.start()

    @asynccontextmanager
    async def lost(self, host: HostOfLab) -> AsyncIterator[None]:
        """A host loses its power: its daemon, its watchdog and its VMs are gone at once."""
        host.kill()
        for pid in self.processes(host):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.lab.remove_traces(instance_of(host.state_dir))
        self.set_clocks(host)
        try:
            yield
        finally:
            host.start()

    @asynccontextmanager
    async def frozen(self, *pids: int) -> AsyncIterator[None]:
        """Processes are stopped, and go on."""
        _signal(pids, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(pids, signal.SIGCONT)

    @asynccontextmanager
    async def ended(self, *pids: int) -> AsyncIterator[None]:
        """Processes are killed; their daemon starts others."""
        _signal(pids, signal.SIGKILL)
        yield

    @asynccontextmanager
    async def cut(self, node: Node, *, incoming: bool = True, outgoing: bool = True) -> AsyncIterator[None]:
        """A host or a member of etcd gets nothing from the others, or can send them nothing, or both."""
        rules = "add table inet bed\n"
        for there, name, hook, near, far, port in (
            (incoming, "in", "input", "iifname", "saddr", "dport"),
            (outgoing, "out", "output", "oifname", "daddr", "sport"),
        ):
            if there:
                rules += (
                    f"add chain inet bed {name} {{ type filter hook {hook} priority -300; }}\n"
                    f"add rule inet bed {name} ip {far} {self.lab.bridge.address} tcp {port} {_API} accept\n"
                    f'add rule inet bed {name} {near} "eth0" drop\n'
                )
        await self._filter(node, rules)
        try:
            yield
        finally:
            with trio.CancelScope(shield=True):
                await self._filter(node, "delete table inet bed\n")

    @asynccontextmanager
    async def delayed(self, seconds: float) -> AsyncIterator[None]:
        """What the last host and etcd send each other arrives late."""
        self.delay_s = seconds
        try:
            yield
        finally:
            self.delay_s = 0.0

    def processes(self, host: HostOfLab, word: str = "") -> list[int]:
        """Returns the processes of a host besides its daemon, by a word of their command lines. They work in its
        directory, or name it."""
        found = []
        directory = os.fsencode(self.lab.directory / host.name)
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != host.pid:
                try:
                    where = os.fsencode((entry / "cwd").readlink())
                    command = (entry / "cmdline").read_bytes()
                except OSError:
                    continue
                theirs = (where + b"/").startswith(directory + b"/") or directory + b"/run/" in command
                if theirs and word.encode() in command:
                    found.append(int(entry.name))
        return found

    async def _filter(self, node: Node, rules: str) -> None:
        await trio.run_process(
            [*self.lab.bridge.enter(node.name), "nft", "-f", "-"], stdin=rules.encode(), capture_stderr=True
        )

    def set_clocks(self, node: Node) -> None:
        """Has a node started with other clocks, as after another boot: each has been up, and has slept, for another
        time."""
        monotonic_s = self._random.randrange(30 * 86400)
        before = self._times.pop(node.name, None)
        if before is not None:
            before.close()
        times = self._times[node.name] = TimeNamespace(monotonic_s, monotonic_s + self._random.randrange(7 * 86400))
        begin = f"nsenter --time={times.path} "
        wall_clock = self.wall_clocks.get(node.name)
        if wall_clock is not None:
            begin = f"{wall_clock.command} {begin}"
        self._script_of(node).write_text(self._commands[node.name].replace("nsenter ", begin))

    def _script_of(self, node: Node) -> Path:
        return self.lab.directory / node.name / "start"

    def spoil(self, flaw: str) -> None:
        """Has all daemons run this Python first."""
        code = f"import sys; {flaw}; sys.argv[:2] = ['']; from volant.daemon.main import main; main()"
        for host in self.hosts:
            own = self._commands[host.name].replace(
                "-m volant.daemon.main", f"-c {shlex.quote(code)} volant.daemon.main"
            )
            self._commands[host.name] = own

    async def keep_proxies(self) -> None:
        """Has the last host reach etcd through this process."""
        host = self.hosts[-1]
        text = self._commands[host.name]
        for number, member in enumerate(self.members):
            address, port = self.lab.bridge.address, _PROXY + number
            text = text.replace(f"https://{member.address}:{_ETCD}", f"https://{address}:{port}")
            listeners = await trio.open_tcp_listeners(port, host=address)
            self._nursery.start_soon(self._serve, listeners, member.address)
        self._commands[host.name] = text

    async def _serve(self, listeners: list[trio.SocketListener], address: str) -> None:
        async def relay(client: trio.SocketStream) -> None:
            with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                with trio.fail_after(_S):
                    server = await trio.open_tcp_stream(address, _ETCD)
                async with server, trio.open_nursery() as nursery:
                    nursery.start_soon(self._pass, client, server, nursery.cancel_scope)
                    nursery.start_soon(self._pass, server, client, nursery.cancel_scope)

        await trio.serve_listeners(relay, listeners)

    async def _pass(self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
        with suppress(OSError, trio.BrokenResourceError, trio.ClosedResourceError):
            while data := await source.receive_some(_PIECE):
                await trio.sleep(self.delay_s)
                await sink.send_all(data)
        scope.cancel()


@asynccontextmanager
async def bed(
    *flags: str,
    random: Random,
    logs: Path,
    hosts: int = HOSTS,
    members: int = MEMBERS,
    flaw: str | None = None,
) -> AsyncIterator[Bed]:
    """Builds the bed, and removes all of it.

    :param flags: more settings of each daemon
    :param random: decides the clocks
    :param logs: a directory that gets the logs of all if something fails
    :param flaw: Python that takes something out of each daemon
    """
    # Short: a socket path has at most 108 bytes.
    directory = Path(mkdtemp(prefix="vb", dir="/tmp"))
    lab = Lab(
        directory,
        cache_dir(),
        ["--accelerator", "tcg", "--standby", "0", "--fleet-ttl-s", str(TTL_S), *flags],
        openssl=(*EARLIER, "openssl"),
    )
    try:
        lab.claim()
        async with trio.open_nursery() as nursery:
            await trio.to_thread.run_sync(lab.build, hosts, members)
            with closing(Bed(lab, nursery, random)) as found:
                if flaw is not None:
                    found.spoil(flaw)
                await found.keep_proxies()
                for node in (*found.members, *found.hosts):
                    found.set_clocks(node)
                await trio.to_thread.run_sync(lab.start)
                yield found
            nursery.cancel_scope.cancel()
    except BaseException:
        for node in (*lab.members, *lab.hosts):
            print(f"--- {node.name}: {_end_of(directory / node.name / 'log')}")
            with suppress(OSError):
                shutil.copy(directory / node.name / "log", logs / node.name)
        raise
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lab.remove)
        shutil.rmtree(directory, ignore_errors=True)


class Faults:
    """Does one thing after the other to a bed, by chance, and puts each right again."""

    def __init__(self, bed: Bed, random: Random, *, longest_s: float = 4 * TTL_S) -> None:
        self._bed = bed
        self._random = random
        self._longest_s = longest_s
        self.done: list[str] = []
        self.kinds: Counter[str] = Counter()

    async def keep(self) -> None:
        """Goes on until cancelled; then everything is put right."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._harm_hosts)
            nursery.start_soon(self._harm_etcd)
            nursery.start_soon(self._move_clocks)

    async def _harm_hosts(self) -> None:
        bed, random = self._bed, self._random
        while True:
            await trio.sleep(random.uniform(0.5, 3))
            host = random.choice(bed.hosts)
            one_way = random.choice([True, False])
            watchdogs = bed.processes(host, "_watchdog.py")
            kinds = {
                "kill the daemon": bed.killed(host),
                "freeze the daemon": bed.frozen(host.pid),
                # Not both: if nothing is left that can act, a host can't hold its VMs back.
                "lose the power": bed.lost(host),
                "cut off": bed.cut(host),
                "cut off one way": bed.cut(host, incoming=one_way, outgoing=not one_way),
                "delay etcd": bed.delayed(random.uniform(0.1, 3)),
            }
            if watchdogs:
                kinds["freeze the watchdog"] = bed.frozen(*watchdogs)
                kinds["kill the watchdog"] = bed.ended(*watchdogs)
            await self._do(host, kinds)

    async def _harm_etcd(self) -> None:
        bed, random = self._bed, self._random
        while True:
            await trio.sleep(random.uniform(1, 2 * TTL_S))
            member = random.choice(bed.members)
            one_way = random.choice([True, False])
            kinds = {
                "kill": bed.killed(member),
                "freeze": bed.frozen(member.pid),
                "cut off": bed.cut(member),
                "cut off one way": bed.cut(member, incoming=one_way, outgoing=not one_way),
            }
            if random.random() < 0.3:
                # No quorum.
                other = random.choice([each for each in bed.members if each is not member])
                kinds = {f"freeze, as {other.name}": bed.frozen(member.pid, other.pid)}
            await self._do(member, kinds)

    async def _move_clocks(self) -> None:
        """Sets wall clocks, which stay as they are."""
        bed, random = self._bed, self._random
        while True:
            await trio.sleep(random.uniform(0, TTL_S))
            host = random.choice(bed.hosts)
            # From a second to a day, as many small steps as large ones.
            ahead_s = random.choice([-1, 1]) * int(FURTHEST_S ** random.random())
            self._note(host, "set the clock", f" {ahead_s:+d} s")
            bed.wall_clocks[host.name].set(ahead_s)

    async def _do(self, node: Node, kinds: Mapping[str, AbstractAsyncContextManager[None]]) -> None:
        name = self._random.choice(list(kinds))
        self._note(node, name)
        async with kinds[name]:
            await trio.sleep(self._random.uniform(0.5, self._longest_s))

    def _note(self, node: Node, kind: str, more: str = "") -> None:
        self.kinds[kind if node in self._bed.hosts else f"{kind} etcd"] += 1
        self.done.append(f"{trio.current_time():.1f} {node.name}: {kind}{more}")


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _end_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")[-4000:]
    except OSError:
        return ""
