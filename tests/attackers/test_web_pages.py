"""A page of another site gets nothing from a daemon on loopback but documents that a person opens."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.api.kit import UPGRADE, Api, api, request, web_vm
from tests.api.test_relay import Guest, guest
from tests.attackers.web_page import ATTACK, CROSS_SITE, SAME_SITE, Site
from tests.chromium import needs_chromium, visiting
from volant.http import ApiSettings

CONSOLE = "https://console.example"
NAVIGATION = {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
IMAGE = {"Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"}
_PATIENCE_S = 60.0
_LINE = re.compile(r"\S+ (?P<method>\S+) (?P<path>\S+) (?P<status>\d+) ")


def answered(log: pytest.LogCaptureFixture) -> list[tuple[str, str, int]]:
    """Returns method, path and status of each request that the daemon answered."""
    lines = [record.getMessage() for record in log.records if record.name == "volant.api.request"]
    found = [_LINE.match(line) for line in lines]
    return [(line["method"], line["path"], int(line["status"])) for line in found if line is not None]


async def until(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    with trio.move_on_after(_PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - a browser's doing
            await trio.sleep(0.05)
        return
    pytest.fail(f"the browser has not done it: {what()}")


@needs_chromium
@pytest.mark.parametrize("host", [SAME_SITE, CROSS_SITE])
async def test_a_hostile_page_gets_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str) -> None:
    caplog.set_level(logging.DEBUG, logger="volant.api.request")
    async with guest(tmp_path) as at:
        with Site(f"http://127.0.0.1:{at.api.server.port}") as site:
            caplog.clear()
            async with visiting(f"http://{host}:{site.port}/", tmp_path / "profile"):
                await until(lambda: bool(site.results), lambda: answered(caplog))
            seen = answered(caplog)
        assert {result for name, result in site.results.items() if name != "beacon"} <= {"refused", "unknown"}, (
            site.results
        )
        assert len(seen) >= 14, seen
        assert [one for one in seen if one[2] != 403] == []
        assert [one["path"] for one in at.seen] == []
        assert (await at.client.get("/api/v1/vms/demo")).status_code == 200
        assert (await at.client.get("/api/v1/system/status")).json()["draining_since"] is None


@needs_chromium
async def test_a_guests_page_at_its_own_origin_gets_nothing_of_the_daemon(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="volant.api.request")
    results: dict[str, str] = {}
    page = b""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while scope["method"] == "POST" and (message := await receive()):
            body += message["body"]
            if not message["more_body"]:
                results.update(json.loads(body))
                break
        headers = [(b"content-type", b"text/html"), (b"content-length", b"%d" % len(page))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": page})

    async with web_vm(tmp_path, app) as served:
        base = f"http://127.0.0.1:{served.server.port}"
        page = (ATTACK % json.dumps(base)).encode()
        row = served.deps.store.projection.rows()[0]
        assert row.manifest.workload is not None
        own = f"http://{row.manifest.workload.port}-{row.id}.localhost:{served.server.port}/"
        async with visiting(own, tmp_path / "profile"):
            await until(lambda: bool(results), lambda: answered(caplog))
        assert {result for name, result in results.items() if name != "beacon"} <= {"refused", "unknown"}, results
        of_daemon = [one for one in answered(caplog) if "/ports/" not in one[1]]
        assert [one for one in of_daemon if one[2] not in (201, 403)] == []
        assert (await served.client.get("/api/v1/vms/demo")).status_code == 200


@needs_chromium
@pytest.mark.parametrize("host", [SAME_SITE, CROSS_SITE])
@pytest.mark.parametrize(
    ("path", "loads"),
    [
        ("/docs", ["/docs", "/openapi.json"]),
        ("/openapi.json", ["/openapi.json"]),
        ("/api/v1/vms/demo/agent/page", ["/api/v1/vms/demo/agent/page"]),
    ],
)
async def test_a_link_leads_to_a_document(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, host: str, path: str, loads: list[str]
) -> None:
    caplog.set_level(logging.DEBUG, logger="volant.api.request")
    async with guest(tmp_path) as at:
        base = f"http://127.0.0.1:{at.api.server.port}"
        with Site(base) as site:
            async with visiting(f"http://{host}:{site.port}/go?{base}{path}", tmp_path / "profile"):
                wanted = {("GET", one, 200) for one in loads}
                await until(lambda: wanted <= set(answered(caplog)), lambda: answered(caplog))


@needs_chromium
async def test_a_link_to_anything_but_a_document_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="volant.api.request")
    async with guest(tmp_path) as at:
        base = f"http://127.0.0.1:{at.api.server.port}"
        with Site(base) as site:
            caplog.clear()
            async with visiting(f"http://{CROSS_SITE}:{site.port}/go?{base}/api/v1/vms", tmp_path / "profile"):
                await until(
                    lambda: any(path == "/api/v1/vms" for _, path, _ in answered(caplog)), lambda: answered(caplog)
                )
            assert ("GET", "/api/v1/vms", 403) in answered(caplog)


@pytest.fixture
async def served(tmp_path: Path) -> Any:
    async with guest(tmp_path) as at:
        at.api.access.replace(ApiSettings(cors_origins=(CONSOLE,)))
        yield at


@pytest.mark.parametrize("site", ["cross-site", "same-site", "something-new"])
async def test_only_documents_and_allowed_origins_pass_from_another_site(served: Guest, site: str) -> None:
    server = served.api.server
    own = f"http://127.0.0.1:{server.port}"
    picture = "/api/v1/vms/demo/agent/picture.svg"
    for path, headers, status in (
        ("/api/v1/vms", NAVIGATION, 403),
        ("/api/v1/vms/demo/logs", NAVIGATION, 403),
        ("/api/v1/vms/demo/agent", NAVIGATION, 200),
        ("/api/v1/vms/demo/agents", NAVIGATION, 403),
        ("/docs", NAVIGATION, 200),
        ("/docs", NAVIGATION | {"Sec_Fetch_Dest": "iframe"}, 403),
        ("/docs", {}, 403),
        ("/healthz", IMAGE, 403),
        (picture, IMAGE, 403),
        (picture, IMAGE | {"Referer": f"{own}/api/v1/vms/demo/agent/page"}, 403),
        ("/api/v1/vms", {"Origin": CONSOLE}, 200),
        ("/api/v1/vms", {"Origin": own}, 403),
        ("/api/v1/events/vms", {"Origin": "https://attacker.example"}, 403),
    ):
        answer = await server.get(path, Sec_Fetch_Site=site, **headers)
        assert answer.status == status, (path, headers, answer.body)
    assert (await server.ask(request("POST", "/docs", b"", Sec_Fetch_Site=site, **NAVIGATION))).status == 403
    assert (await server.get("/ws/v1/vms/demo/logs", Sec_Fetch_Site=site, **UPGRADE)).status == 403


async def test_own_pages_and_people_are_allowed(served: Guest) -> None:
    for site in ("same-origin", "none"):
        for path in ("/api/v1/vms", "/api/v1/vms/demo/logs", "/healthz"):
            assert (await served.api.server.get(path, Sec_Fetch_Site=site)).status == 200


async def test_answers_are_restricted_to_their_own_origin(served: Guest) -> None:
    for path in ("/docs", "/healthz", "/api/v1/vms", "/api/v1/vms/none", "/nothing", "/api/v1/vms/demo/logs"):
        answer = await served.api.server.get(path)
        assert answer.headers["cross-origin-resource-policy"] == "same-origin", path
    for path in ("/api/v1/vms/demo/agent/page", f"/api/v1/vms/demo/ports/{served.port}/page"):
        assert (await served.api.server.get(path)).headers["cross-origin-resource-policy"] == "cross-origin"


@pytest.fixture
async def plain(tmp_path: Path) -> Any:
    async with api(tmp_path) as at:
        yield at


async def test_a_backup_is_not_a_get(plain: Api) -> None:
    answer = await plain.client.get("/api/v1/system/backup")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    taken = await plain.client.post("/api/v1/system/backup")
    assert taken.status_code == 200
    assert taken.content.startswith(b"SQLite format 3\0")
    assert (await plain.client.post("/api/v1/system/backup", content=b'{"x":1}')).status_code == 400
