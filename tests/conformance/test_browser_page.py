"""A page in Debian's Chromium follows events and a log of a daemon with a key, is disconnected, and misses nothing.

The page runs the code of the how-to pages. It reaches the daemon through a proxy of this test, which cuts connections;
the daemon behind it is killed and restarted.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from contextlib import AsyncExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.chromium import needs_chromium, visiting
from tests.system.kit import REPOSITORY, Daemon, adopted, boot, reachable, run, spec
from tests.web_server import WebServer, answer_html
from volant.client import Client, LogLine
from volant.model import Event

_HOW_TOS = ("events-in-a-browser.md", "log-sockets.md")
_PATIENCE_S = 90.0
_END = "that was all"

pytestmark = needs_chromium


def page(base: str, key: str) -> str:
    """The code of the how-to pages, and the part that reports to the test."""
    texts = [(REPOSITORY / "docs" / "how-to" / name).read_text() for name in _HOW_TOS]
    code = "\n".join(block for text in texts for block in re.findall(r"```js\n(.*?)```", text, re.DOTALL))
    return f"""<!doctype html><title>follower</title><script>
{code}
const base = {json.dumps(base)}, key = {json.dumps(key)};
const seen = {{ vms: null, after: null, ticketed: [], keyed: [], lines: [] }};
let told = Promise.resolve();
const tell = () => {{ told = told.then(() => fetch("/seen", {{ method: "POST", body: JSON.stringify(seen) }})); }};
listVms(base, key).then(({{ vms, after }}) => {{
  Object.assign(seen, {{ vms: vms.map((vm) => vm.name), after }});
  tell();
  followEvents(base, key, after, (event) => {{ seen.ticketed.push(event); tell(); }});
  followEventsByKey(base, key, after, (event) => {{ seen.keyed.push(event); tell(); }});
  followLog(base, key, "talker", (line) => {{ seen.lines.push(line.seq); tell(); }}, 0);
}});
</script>"""


class Site(WebServer):
    """The page's own origin."""

    def __init__(self) -> None:
        super().__init__()
        self.html = ""
        self.seen: dict[str, Any] = {"vms": None, "ticketed": [], "keyed": [], "lines": []}

    def get(self, request: BaseHTTPRequestHandler) -> None:
        if request.path == "/":
            answer_html(request, 200, self.html.encode())
        else:
            answer_html(request, 404)

    def post(self, request: BaseHTTPRequestHandler, body: bytes) -> None:
        self.seen = json.loads(body)
        answer_html(request, 200)


class Proxy:
    """A proxy in front of the daemon that can cut its connections."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._scopes: set[trio.CancelScope] = set()
        self.port = 0

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        await trio.serve_listeners(self._serve, listeners, task_status=_Started(task_status))

    def cut(self) -> int:
        """Cuts every connection at once; returns how many there were."""
        count = len(self._scopes)
        for scope in self._scopes:
            scope.cancel()
        return count

    async def _serve(self, client: trio.SocketStream) -> None:
        port = int(self._daemon.base_url.rpartition(":")[2])
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                async with client, await trio.open_tcp_stream("127.0.0.1", port) as server:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_copy, client, server, nursery.cancel_scope)
                        await _copy(server, client, nursery.cancel_scope)
            except OSError:
                pass  # The daemon is down.
            finally:
                self._scopes.discard(scope)


class _Started(trio.TaskStatus[list[trio.SocketListener]]):
    def __init__(self, outer: trio.TaskStatus[None]) -> None:
        self._outer = outer

    def started(self, value: object = None) -> None:
        self._outer.started()


async def _copy(source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope) -> None:
    try:
        while data := await source.receive_some(65536):
            await sink.send_all(data)
    except trio.BrokenResourceError:
        pass
    scope.cancel()


async def seen_by(site: Site, what: str, condition: Callable[[dict[str, Any]], bool]) -> None:
    with trio.move_on_after(_PATIENCE_S):
        while not condition(site.seen):  # noqa: ASYNC110 - the browser offers no wait
            await trio.sleep(0.05)
        return
    pytest.fail(f"the page has not seen {what}: {site.seen}")


async def talk(client: Client, text: str) -> None:
    await run(client, "talker", "sh", "-c", f"echo {text} > /dev/ttyS0")


async def happen(client: Client, name: str) -> None:
    """Causes some events: creates and deletes a VM."""
    await client.vms.create(spec(name))
    await client.vms.delete(name)


def deleted(*names: str) -> Callable[[dict[str, Any]], bool]:
    """Returns whether the page has seen the deletion of these VMs, on both streams."""

    def condition(seen: dict[str, Any]) -> bool:
        return all(
            {event["name"] for event in seen[stream] if event["type"] == "VM_DELETED"} >= set(names)
            for stream in ("ticketed", "keyed")
        )

    return condition


async def test_a_page_that_is_disconnected_misses_nothing(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    key = secrets.token_urlsafe(24)
    site = Site()
    daemon = make_daemon(environ={"VOLANT_API_KEY": key, "VOLANT_CORS_ORIGINS": site.origin})
    proxy = Proxy(daemon)
    with site:
        async with trio.open_nursery() as nursery:
            await nursery.start(proxy.run)
            async with AsyncExitStack() as browser:
                async with daemon.client() as client:
                    await boot(client, "talker")
                    site.html = page(f"http://127.0.0.1:{proxy.port}", key)
                    await browser.enter_async_context(visiting(site.origin, tmp_path / "profile"))
                    await seen_by(site, "the list", lambda seen: seen["vms"] == ["talker"])
                    await happen(client, "one")
                    await talk(client, "first")
                    await seen_by(site, "the first events", deleted("one"))
                    await seen_by(site, "the first lines", lambda seen: bool(seen["lines"]))
                    # Two event streams and the log.
                    assert proxy.cut() >= 3
                    await happen(client, "two")
                    await talk(client, "second")
                    await seen_by(site, "what came after the cut", deleted("one", "two"))
                    daemon.kill()
                    daemon.start()
                async with daemon.client() as client:
                    await adopted(client)
                    await reachable(client, "talker")
                    await happen(client, "three")
                    await talk(client, _END.replace(" ", "-"))
                    await seen_by(site, "what came after the restart", deleted("one", "two", "three"))
                    expected = await lines_of(client)
                    await seen_by(site, "every line", lambda seen: len(seen["lines"]) >= len(expected))
                    events = await events_after(client, site.seen["after"])
                assert site.seen["lines"] == expected
                for stream in ("ticketed", "keyed"):
                    assert [event["id"] for event in site.seen[stream]] == events, stream
            nursery.cancel_scope.cancel()


async def lines_of(client: Client) -> list[int]:
    async with client.vms.logs("talker", since=0, follow=False) as feed:
        return [item.seq async for item in feed if isinstance(item, LogLine)]


async def events_after(client: Client, event_id: str) -> list[str]:
    """Returns the ids of all events since then, up to the newest."""
    newest = await client.newest_event()
    ids: list[str] = []
    with trio.fail_after(_PATIENCE_S):
        async with client.events(after=event_id) as feed:
            while newest not in ids:
                event = await feed.receive()
                assert isinstance(event, Event), event
                ids.append(event.id)
    return ids
