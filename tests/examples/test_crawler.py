"""The crawler fetches each page once even if workers crash, and keeps to the rate limit of each host."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import trio

from actors import open_system
from actors.testing import Simulation, simulate
from examples.crawler.crawler import Finished, Summary, build

from .kit import run_module

PAGES = 30


def crawl(sim: Simulation, at_s: list[float], broken: str = "") -> Any:
    """A site whose pages take some time; the parser crashes on `broken`."""

    async def fetch(url: str) -> tuple[str, ...]:
        at_s.append(trio.current_time())
        await trio.sleep(sim.rng.random() * 2)
        number = int(url.rpartition("/")[2])
        if url == broken:
            raise ValueError("a parser meets the whole world")
        return tuple(f"http://site/{n}" for n in (2 * number + 1, 2 * number + 2, 0) if n < PAGES)

    async def run() -> Summary:
        tree, frontier = build(fetch, "http://site/0", workers=5, per_s=4, burst=3)
        async with open_system(tree, rng=sim.rng):
            return await frontier.ask(Finished(), timeout_s=3600)

    return run()


def test_every_page_is_fetched_once_within_the_rate() -> None:
    async def main(sim: Simulation) -> None:
        at_s: list[float] = []
        summary = await crawl(sim, at_s)
        assert sorted(summary.fetched) == sorted(f"http://site/{n}" for n in range(PAGES))
        assert len(at_s) == PAGES
        for begin in at_s:
            assert sum(begin <= at < begin + 1 for at in at_s) <= 4 + 3

    for seed in range(20):
        simulate(main, seed=seed)


def test_a_worker_that_crashes_loses_no_page() -> None:
    async def main(sim: Simulation) -> int:
        summary = await crawl(sim, [], broken="http://site/3")
        found = Counter(summary.fetched) + Counter(summary.failed)
        assert set(found.values()) == {1}
        assert "http://site/3" in summary.failed
        assert "http://site/4" in summary.fetched
        return sim.faults.report().sites["crawler.fetch"].fired

    fired = [simulate(main, seed=seed, faults={"crawler.fetch": (0.1, RuntimeError)}) for seed in range(20)]
    assert sum(fired) > 20


@pytest.fixture
def site(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "index.html").write_text('<a href="one.html">1</a> <A class="x" HREF=\'/two.html#top\'>2</A>')
    (tmp_path / "one.html").write_text('<a href="/">home</a> <a href="http://elsewhere.invalid/">out</a>')
    (tmp_path / "two.html").write_text('<a href="lost.html">lost</a>')

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def test_it_crawls_over_http(site: str) -> None:
    ran = run_module("examples.crawler", site, "50")
    assert "3 pages fetched, 1 failed" in ran.stdout, ran.stderr
    assert ran.returncode == 1
