"""A crawler that limits its rate for each host, loses no page to a crash, and knows when it is done.

    crawl
    ├─ frontier     pages to fetch, the worker of each, and the results
    ├─ limiter      one token bucket for each host
    └─ workers      fetch pages; a crashed one is restarted, and the frontier takes its page back

The function that fetches a page is a parameter: HTTP in production, a made-up site in a test.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import trio

from actors import Actor, Child, Deferred, Down, Ref, Request, Supervisor, fault, handles

Fetch = Callable[[str], Awaitable[tuple[str, ...]]]
"""Fetches an address; returns the addresses that its page links to. :raises OSError: if the page is unavailable"""


@dataclass(frozen=True)
class Next(Request[str]):
    """A worker asks for a page, and waits until there is one. The frontier takes the page back if the worker dies."""

    worker: Ref[Actor]


@dataclass(frozen=True)
class Fetched(Request[None]):
    """A worker reports the links of its page; None: the page is unavailable."""

    worker: Ref[Actor]
    links: tuple[str, ...] | None


@dataclass(frozen=True)
class Finished(Request["Summary"]):
    """Answered when nothing is left to do."""


@dataclass(frozen=True)
class Summary:
    fetched: tuple[str, ...]
    failed: tuple[str, ...]


class Frontier(Actor):
    """Hands out each page once, and again if its worker crashes, up to `tries` times."""

    def __init__(self, begin: str, *, pages_max: int = 1000, tries: int = 3) -> None:
        self.pages_max = pages_max
        self.tries = tries
        self.seen = {begin}
        self.todo = deque([begin])
        self.attempts: dict[str, int] = {}
        self.busy: dict[Ref[Actor], str] = {}
        self.idle: dict[Ref[Actor], Deferred[str]] = {}
        self.waiting: list[Deferred[Summary]] = []
        self.fetched: list[str] = []
        self.failed: list[str] = []

    @handles(Next)
    async def next(self, message: Next) -> Deferred[str]:
        self.ctx.monitor(message.worker)
        deferred = self.idle[message.worker] = self.ctx.defer(message)
        self.hand_out()
        return deferred

    @handles(Fetched)
    async def page(self, message: Fetched) -> None:
        url = self.busy.pop(message.worker, None)
        if url is None:
            return  # requested from an earlier incarnation
        if message.links is None:
            self.failed.append(url)
        else:
            self.fetched.append(url)
        for link in message.links or ():
            if link not in self.seen and len(self.seen) < self.pages_max:
                self.seen.add(link)
                self.todo.append(link)
        self.hand_out()

    @handles(Down)
    async def worker_died(self, message: Down) -> None:
        self.idle.pop(message.ref, None)
        url = self.busy.pop(message.ref, None)
        if url is not None:
            self.attempts[url] = self.attempts.get(url, 0) + 1
            if self.attempts[url] < self.tries:
                self.todo.appendleft(url)
            else:
                self.failed.append(url)
        self.hand_out()

    @handles(Finished)
    async def finished(self, message: Finished) -> Deferred[Summary]:
        deferred = self.ctx.defer(message)
        self.waiting.append(deferred)
        self.hand_out()
        return deferred

    def hand_out(self) -> None:
        while self.todo and self.idle:
            worker = next(iter(self.idle))
            url = self.busy[worker] = self.todo.popleft()
            self.idle.pop(worker).reply(url)
        if not self.todo and not self.busy:
            for deferred in self.waiting:
                deferred.reply(Summary(tuple(self.fetched), tuple(self.failed)))
            self.waiting.clear()

    def inspect(self) -> dict[str, object]:
        return {"todo": len(self.todo), "busy": sorted(self.busy.values()), "fetched": len(self.fetched)}


@dataclass(frozen=True)
class Acquire(Request[None]):
    """Answered when the next request to `host` may be sent."""

    host: str


@dataclass(frozen=True)
class Turn:
    host: str


class Limiter(Actor):
    """Allows each host `burst` requests at once, and `per_s` a second on average."""

    def __init__(self, *, per_s: float, burst: int) -> None:
        self.interval_s = 1 / per_s
        self.ahead_s = (burst - 1) / per_s
        self.due_s: dict[str, float] = {}
        self.queues: dict[str, deque[Deferred[None]]] = {}

    @handles(Acquire)
    async def acquire(self, message: Acquire) -> Deferred[None]:
        deferred = self.ctx.defer(message)
        now_s = trio.current_time()
        due_s = max(self.due_s.get(message.host, 0.0), now_s - self.ahead_s)
        self.due_s[message.host] = due_s + self.interval_s
        self.queues.setdefault(message.host, deque()).append(deferred)
        self.ctx.send_after(max(0.0, due_s - now_s), Turn(message.host))
        return deferred

    @handles(Turn)
    async def turn(self, message: Turn) -> None:
        queue = self.queues[message.host]
        queue.popleft().reply(None)
        if not queue:
            del self.queues[message.host]


class Worker(Actor):
    """Fetches one page after the other. It may crash: its parser reads untrusted input."""

    def __init__(self, fetch: Fetch, frontier: Ref[Frontier], limiter: Ref[Limiter], timeout_s: float) -> None:
        self.fetch = fetch
        self.frontier = frontier
        self.limiter = limiter
        self.timeout_s = timeout_s

    async def on_start(self) -> None:
        self.ctx.spawn(self.work)

    async def work(self) -> None:
        me = self.ctx.self_ref
        while True:
            url = await self.frontier.ask(Next(me), timeout_s=3600)
            await self.limiter.ask(Acquire(urlsplit(url).netloc), timeout_s=600)
            links: tuple[str, ...] | None = None
            try:
                with trio.fail_after(self.timeout_s):
                    fault("crawler.fetch")
                    links = await self.fetch(url)
            except (OSError, trio.TooSlowError):
                pass
            await self.frontier.ask(Fetched(me, links), timeout_s=60)


def build(
    fetch: Fetch, begin: str, *, workers: int = 8, per_s: float = 5.0, burst: int = 2, timeout_s: float = 20.0
) -> tuple[Supervisor, Ref[Frontier]]:
    """Returns the tree, and the frontier, which knows when the crawl is done."""
    frontier = Child("frontier", partial(Frontier, begin))
    limiter = Child("limiter", partial(Limiter, per_s=per_s, burst=burst))
    start = partial(Worker, fetch, frontier.ref, limiter.ref, timeout_s)
    team = Supervisor(intensity=100, period_s=10, children=[Child(f"worker-{n}", start) for n in range(workers)])
    return Supervisor(children=[frontier, limiter, Child("workers", team)]), frontier.ref
