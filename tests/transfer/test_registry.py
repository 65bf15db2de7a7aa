"""Snapshots in a real registry: what is moved and what is not, what survives a failure, and what is refused."""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.api.kit import Api, streamed, until
from tests.api.test_images import first_events
from tests.oci.kit import write_layout
from tests.oci.registry import PASSWORD, Registry, needs_registry
from tests.oci.test_images import BASE, FIRST
from tests.transfer.kit import (
    MEMORY_MB,
    Proxy,
    code_of,
    cut,
    files_of,
    host,
    left_by_pulls,
    piece,
    pull,
    push,
    refuse,
    take,
    trickle,
)
from volant.model import EventType
from volant.oci import _distribution
from volant.transfer import TransferSettings, _transfers

pytestmark = [pytest.mark.programs, needs_registry]
Request = BaseHTTPRequestHandler


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hosts try twice, and at once."""
    monkeypatch.setattr(_distribution, "_TRIES", 2)
    monkeypatch.setattr(_distribution, "_PAUSE_S", 0.01)


@pytest.fixture
async def here(tmp_path: Path, proxy: Proxy) -> AsyncIterator[Api]:
    """A host that uses the registry through the proxy."""
    async with host(tmp_path / "here", proxy.address) as running:
        yield running


@pytest.fixture
async def there(tmp_path: Path, proxy: Proxy) -> AsyncIterator[Api]:
    """Another one."""
    async with host(tmp_path / "there", proxy.address) as running:
        yield running


async def moving(running: Api) -> list[dict[str, Any]]:
    """Returns the transfers that have begun to move chunks."""
    shown = (await running.client.get("/api/v1/transfers")).json()
    return [each for each in shown if each["phase"] == "moving"]


def settings(proxy: Proxy, **members: Any) -> TransferSettings:
    return TransferSettings(plain_http=frozenset([proxy.address]), **members)


@pytest.fixture
def repository(proxy: Proxy, request: pytest.FixtureRequest) -> str:
    """A repository of the test's own."""
    name = "".join(letter if letter.isalnum() else "-" for letter in request.node.name.lower()).strip("-")
    return f"{proxy.address}/tests/{'-'.join(filter(None, name.split('-')))}"


async def test_a_snapshot_arrives_as_it_was(here: Api, there: Api, repository: str, proxy: Proxy) -> None:
    await take(
        here, "warm", "a  bc", volume=piece("v") * 4, labels={"team": "a"}, env={"A": "b"}, kernel_cmdline="quiet"
    )
    pushed = await push(here, "warm", f"{repository}:1")
    assert pushed.status_code == 200, pushed.text
    assert pushed.json()["reference"] == f"{repository}:1"
    assert pushed.json()["sent_chunks"] == pushed.json()["chunks"] == 5
    pulled = await pull(there, f"{repository}:1")
    assert pulled.status_code == 201, pulled.text
    assert pulled.headers["location"] == "/api/v1/snapshots/warm"
    view = pulled.json()
    assert view["source"] == f"{repository}@{pushed.json()['digest']}"
    assert (view["vm"], view["memory_mb"], view["volumes"], view["status"]) == ("demo", MEMORY_MB, ["data"], "ready")
    assert files_of(there, "warm") == files_of(here, "warm")
    (ours,), (theirs,) = (running.deps.store.projection.snapshots.values() for running in (here, there))
    assert (theirs.vm.labels, theirs.vm.env, theirs.vm.kernel_cmdline) == ({"team": "a"}, {"A": "b"}, "quiet")
    assert theirs.vm.volumes[0].id != ours.vm.volumes[0].id
    assert theirs.size_bytes <= ours.size_bytes
    assert left_by_pulls(there) == []
    assert (await there.client.get("/api/v1/transfers")).json() == []


async def test_events_and_the_audit_log_say_what_travelled(here: Api, there: Api, repository: str) -> None:
    await take(here, "warm", "a")
    digest = (await push(here, "warm", f"{repository}:1")).json()["digest"]
    await pull(there, f"{repository}:1")
    assert (await pull(there, f"{repository}:2")).status_code == 404
    outcomes = []
    for running, kind, operation in (
        (here, "SNAPSHOT_PUSHED", "push_snapshot"),
        (there, "SNAPSHOT_PULLED", "pull_snapshot"),
    ):
        async with streamed(running.server, f"/api/v1/events/vms?types={kind}&since=0") as body:
            said = (await first_events(body, EventType(kind))).decode()
        (data,) = [line.removeprefix("data: ") for line in said.splitlines() if line.startswith("data: ")]
        event = json.loads(data)
        assert (event["name"], event["snapshot"], event["reference"]) == ("demo", "warm", f"{repository}@{digest}")
        records = (await running.client.get(f"/api/v1/audit?operation={operation}")).json()
        outcomes.append([record["outcome"] for record in records])
    assert outcomes == [["begun", "done"], ["begun", "done", "begun", "404 image-not-found"]]
    (node,) = [each for each in (await there.client.get("/api/v1/forks")).json()["nodes"] if each["kind"] == "snapshot"]
    assert node["name"] == "warm"


async def test_a_digest_names_a_snapshot_for_ever(here: Api, repository: str) -> None:
    await take(here, "first", "a")
    await take(here, "second", "b")
    digest = (await push(here, "first", f"{repository}:t")).json()["digest"]
    await push(here, "second", f"{repository}:t")
    assert (await pull(here, f"{repository}@{digest}", "again")).status_code == 201
    assert files_of(here, "again") == files_of(here, "first")


async def test_siblings_share_chunks(here: Api, there: Api, repository: str, proxy: Proxy) -> None:
    await take(here, "first", "abcdef")
    await take(here, "second", "abcxef")
    assert (await push(here, "first", f"{repository}:1")).json()["sent_chunks"] == 7
    second = (await push(here, "second", f"{repository}:2")).json()
    assert (second["sent_chunks"], second["chunks"]) == (2, 7)
    assert second["sent_bytes"] < 10_000
    assert len(proxy.sent) == len(set(proxy.sent)) == 7 + 2 + 2

    assert (await pull(there, f"{repository}:1")).status_code == 201
    proxy.received.clear()
    assert (await pull(there, f"{repository}:2")).status_code == 201
    # The document, and what the host lacks: one page of memory, and the devices.
    assert len(proxy.received) == 3
    assert files_of(there, "second") == files_of(here, "second")


async def test_chunks_of_other_projects_are_not_used(here: Api, repository: str, proxy: Proxy) -> None:
    assert (await here.client.post("/api/v1/projects", json={"name": "other"})).status_code == 201
    await take(here, "secret", "abc", project="other")
    reference = f"{repository}:1"
    pushed = await here.client.post(
        "/api/v1/snapshots/secret/push", json={"reference": reference}, headers={"Volant-Project": "other"}
    )
    assert pushed.status_code == 200, pushed.text
    assert (await pull(here, reference)).status_code == 201
    assert len(proxy.received) == 5


@pytest.mark.parametrize("direction", ["push", "pull"])
async def test_what_was_moved_is_not_moved_again(
    here: Api, there: Api, repository: str, proxy: Proxy, direction: str
) -> None:
    await take(here, "warm", "abcdefghijklmnopqrstuvwxyz")
    reference = f"{repository}:1"
    left = [12]

    def breaks(request: Request) -> bool:
        wanted = "PUT" if direction == "push" else "GET"
        if request.command != wanted or "/blobs/" not in request.path:
            return False
        left[0] -= 1
        if left[0] < 0:
            request.close_connection = True
            return True
        return False

    if direction == "pull":
        assert (await push(here, "warm", reference)).is_success
    proxy.fails = breaks
    answer = await (push(here, "warm", reference) if direction == "push" else pull(there, reference))
    assert (answer.status_code, code_of(answer)) == (503, "fetch-interrupted"), answer.text
    assert (await there.client.get("/api/v1/snapshots")).json() == []
    await until(lambda: proxy.under_way == 0)
    proxy.fails = lambda request: False
    done = proxy.sent if direction == "push" else proxy.received
    chunks = set(done)
    answer = await (push(here, "warm", reference) if direction == "push" else pull(there, reference))
    assert answer.is_success, answer.text
    if direction == "push":
        assert answer.json()["sent_chunks"] <= 27 - len(chunks)
        assert len(done) == len(set(done))
    else:
        # The document comes again, and what was on its way when the connection broke.
        assert len(done) <= 27 + 2 + 7
        assert files_of(there, "warm") == files_of(here, "warm")
        assert left_by_pulls(there) == []


async def test_what_broken_pulls_have_left_does_not_pile_up(here: Api, there: Api, repository: str) -> None:
    directory = there.deps.vms.copies.checkpoints.snapshot_dir
    for number in range(12):
        (directory / f"pull-{number:02}").mkdir(parents=True)
        os.utime(directory / f"pull-{number:02}", (time.time() - 1000 + number,) * 2)
    os.utime(directory / "pull-11", (time.time() - 2 * 86400,) * 2)
    await take(here, "warm", "a")
    await push(here, "warm", f"{repository}:1")
    assert (await pull(there, f"{repository}:1")).status_code == 201
    assert left_by_pulls(there) == [f"pull-{number:02}" for number in range(3, 11)]


async def test_a_client_that_leaves_ends_its_transfer(here: Api, repository: str, proxy: Proxy, tmp_path: Path) -> None:
    await take(here, "warm", "abcdefgh", volume=os.urandom(2**20))
    await push(here, "warm", f"{repository}:1")
    async with host(tmp_path / "slow", proxy.address, transfer=settings(proxy, bytes_per_s=20_000)) as there:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pull, there, f"{repository}:1")
            with trio.fail_after(10):
                while not (shown := await moving(there)):  # noqa: ASYNC110 - nothing says so
                    await trio.sleep(0.01)
            assert (shown[0]["kind"], shown[0]["snapshot"], shown[0]["total_chunks"]) == ("pull", "warm", 13)
            nursery.cancel_scope.cancel()
        await until(lambda: not there.deps.transfers.under_way(None))
        assert (await there.client.get("/api/v1/snapshots")).json() == []


FAILURES: dict[str, tuple[Callable[[Proxy, Request], object], int, str]] = {
    "unauthorized": (lambda proxy, request: refuse(request, 401), 403, "image-unauthorized"),
    "forbidden": (lambda proxy, request: refuse(request, 403), 403, "image-unauthorized"),
    "missing": (lambda proxy, request: refuse(request, 404), 404, "image-not-found"),
    "busy": (lambda proxy, request: refuse(request, 429, Retry_After="0"), 503, "registry-busy"),
    "down": (lambda proxy, request: refuse(request, 502), 503, "registry-unreachable"),
    "odd": (lambda proxy, request: refuse(request, 418), 422, "registry-refused"),
    "circular": (lambda proxy, request: refuse(request, 307, Location=request.path), 503, "registry-unreachable"),
    "elsewhere": (lambda proxy, request: refuse(request, 307, Location="ftp://x/"), 503, "registry-unreachable"),
    "nowhere": (lambda proxy, request: refuse(request, 307, Location="http://[x/"), 503, "registry-unreachable"),
    "stalls": (lambda proxy, request: proxy.released.wait(20), 503, "fetch-stalled"),
    "greets": (lambda proxy, request: trickle(proxy, request, b"HTTP/1.1 103 Hi\r\n\r\n"), 503, "fetch-stalled"),
    "dawdles": (lambda proxy, request: trickle(proxy, request, b"H", b"T", b"T", b"P"), 503, "fetch-stalled"),
    "breaks": (lambda proxy, request: cut(request), 503, "fetch-interrupted"),
}


ONLY_READS = ("circular", "elsewhere", "nowhere")
"""Writes are not redirected."""


@pytest.mark.parametrize("direction", ["push", "pull"])
async def test_a_failing_registry_is_reported_as_what_it_is(
    tmp_path: Path, repository: str, proxy: Proxy, direction: str
) -> None:
    async with host(tmp_path / "here", proxy.address, transfer=settings(proxy, stalled_s=0.3)) as here:
        await take(here, "warm", "ab")
        await push(here, "warm", f"{repository}:pull")

        async def transfer(failure: str) -> Any:
            reference = f"{repository}-{failure}:1"
            return await (push(here, "warm", reference) if direction == "push" else pull(here, pulled, failure))

        pulled = f"{repository}:pull"
        for failure, (fail, status, code) in FAILURES.items():
            if direction == "push" and failure in ONLY_READS:
                continue

            def fails(request: Request, fail: Callable[[Proxy, Request], object] = fail) -> bool:
                if request.command != {"push": "POST", "pull": "GET"}[direction]:
                    return False
                fail(proxy, request)
                return True

            proxy.fails = fails
            answer = await transfer(failure)
            assert (failure, answer.status_code, code_of(answer)) == (failure, status, code), answer.text
            assert proxy.address in answer.json()["detail"]
            proxy.fails = lambda request: False
            answer = await transfer(failure)
            assert answer.is_success, answer.text


async def test_an_upload_to_something_that_is_no_url_is_refused(here: Api, repository: str, proxy: Proxy) -> None:
    await take(here, "warm", "ab")

    def fails(request: Request) -> bool:
        if request.command == "POST":
            refuse(request, 202, Location="http://[x/")
        return request.command == "POST"

    proxy.fails = fails
    answer = await push(here, "warm", f"{repository}:1")
    assert (answer.status_code, code_of(answer)) == (503, "registry-unreachable"), answer.text


async def test_a_registry_that_is_busy_for_a_moment_is_asked_again(here: Api, repository: str, proxy: Proxy) -> None:
    await take(here, "warm", "ab")
    busy = {"HEAD", "POST", "PUT"}

    def fails(request: Request) -> bool:
        if request.command not in busy:
            return False
        busy.discard(request.command)
        refuse(request, 429, Retry_After="0")
        return True

    proxy.fails = fails
    assert (await push(here, "warm", f"{repository}:1")).status_code == 200


@pytest.mark.parametrize("what", ["chunk", "document", "manifest"])
async def test_what_was_changed_on_the_way_is_refused(
    here: Api, there: Api, repository: str, proxy: Proxy, what: str
) -> None:
    await take(here, "warm", "ab")
    digest = (await push(here, "warm", f"{repository}:1")).json()["digest"]

    def changes(path: str, body: bytes) -> bytes:
        kind = "manifest" if "/manifests/" in path else "document" if body[:1] == b"{" else "chunk"
        return body[:-1] + b" " if kind == what else body

    proxy.changes = changes
    answer = await pull(there, f"{repository}@{digest}")
    assert (answer.status_code, code_of(answer)) == (422, "image-mismatch"), answer.text
    assert (await there.client.get("/api/v1/snapshots")).json() == []


async def test_something_else_in_the_registry_is_no_snapshot(
    here: Api, repository: str, registry: Registry, tmp_path: Path
) -> None:
    image = write_layout(tmp_path / "layout", [BASE, FIRST], Cmd=["first"])
    registry.push(image.layout, "tests/image:t")
    answer = await pull(here, f"{repository.partition('/')[0]}/tests/image:t")
    assert (answer.status_code, code_of(answer)) == (422, "snapshot-unsupported")


async def test_names_and_references_are_checked_before_anything_is_moved(
    here: Api, repository: str, proxy: Proxy
) -> None:
    await take(here, "warm", "ab")
    reference = f"{repository}:1"
    assert code_of(await push(here, "none", reference)) == "snapshot-not-found"
    assert (await push(here, "warm", f"{repository}@sha256:{'0' * 64}")).json()["field"] == "reference"
    assert (await push(here, "warm", "oci:/tmp/x:t")).json()["field"] == "reference"
    assert code_of(await pull(here, reference, "warm")) == "snapshot-exists"
    assert proxy.requests == []
    assert (await push(here, "warm", reference)).status_code == 200
    proxy.received.clear()
    assert code_of(await pull(here, reference)) == "snapshot-exists"
    assert len(proxy.received) == 1


async def test_a_quota_holds_for_snapshots_that_are_pulled(here: Api, there: Api, repository: str) -> None:
    await take(here, "warm", "ab")
    await push(here, "warm", f"{repository}:1")
    await there.client.post("/api/v1/projects", json={"name": "small", "quota": {"snapshots": 0}})
    answer = await there.client.post(
        "/api/v1/snapshots/pull", json={"reference": f"{repository}:1"}, headers={"Volant-Project": "small"}
    )
    assert (answer.status_code, code_of(answer)) == (409, "quota-exceeded")


async def test_a_request_that_is_sent_twice_pulls_once(here: Api, there: Api, repository: str) -> None:
    await take(here, "warm", "ab")
    await push(here, "warm", f"{repository}:1")
    first = await pull(there, f"{repository}:1", **{"Idempotency-Key": "once"})
    again = await pull(there, f"{repository}:1", **{"Idempotency-Key": "once"})
    assert first.json() == again.json()
    assert again.headers["idempotency-replayed"] == "true"


async def test_pulls_of_the_same_at_once_wait_for_each_other(
    here: Api, there: Api, repository: str, proxy: Proxy
) -> None:
    await take(here, "warm", "abcdef")
    await push(here, "warm", f"{repository}:1")
    codes = []

    async def get(name: str) -> None:
        codes.append((await pull(there, f"{repository}:1", name)).status_code)

    async with trio.open_nursery() as nursery:
        for name in ("one", "two"):
            nursery.start_soon(get, name)
    assert codes == [201, 201]
    assert len(proxy.received) == 7 + 2
    assert files_of(there, "one") == files_of(there, "two") == files_of(here, "warm")


async def test_no_project_takes_all_places(
    repository: str, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_transfers, "_OF_ONE", 1)
    other = {"Volant-Project": "other"}

    def fails(request: Request) -> bool:
        proxy.released.wait(20)
        return True

    proxy.fails = fails
    async with host(tmp_path / "here", proxy.address) as here, trio.open_nursery() as nursery:
        await here.client.post("/api/v1/projects", json={"name": "other"})
        nursery.start_soon(pull, here, f"{repository}:1")
        await until(lambda: bool(here.deps.transfers.under_way("default")))
        refused = await pull(here, f"{repository}:1")
        assert (refused.status_code, code_of(refused)) == (503, "too-many-transfers")
        assert "1 of project 'default'" in refused.json()["detail"]
        nursery.start_soon(lambda: pull(here, f"{repository}:1", **other))
        await until(lambda: bool(here.deps.transfers.under_way("other")))
        nursery.cancel_scope.cancel()


async def test_a_transfer_has_a_deadline(repository: str, proxy: Proxy, tmp_path: Path) -> None:
    async with host(tmp_path / "here", proxy.address, transfer=settings(proxy, timeout_s=0.2)) as here:
        proxy.fails = lambda request: proxy.released.wait(20)
        late = await pull(here, f"{repository}:1")
        assert (late.status_code, code_of(late)) == (503, "transfer-timeout")
        assert not here.deps.transfers.under_way(None)


async def test_bandwidth_is_bounded(repository: str, proxy: Proxy, tmp_path: Path) -> None:
    async with host(tmp_path / "here", proxy.address, transfer=settings(proxy, bytes_per_s=800_000)) as here:
        # What can't be compressed.
        await take(here, "noise", "a", volume=os.urandom(2**20))
        began = trio.current_time()
        assert (await push(here, "noise", f"{repository}:1")).status_code == 200
        assert trio.current_time() - began > 0.9


# Credentials


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("guarded") / "r") as running:
        yield running


async def test_credentials_come_with_the_request_or_from_a_secret(guarded: Registry, tmp_path: Path) -> None:
    reference = f"{guarded.address}/team/warm:1"
    async with host(tmp_path / "here", guarded.address) as here:
        await take(here, "warm", "ab")
        answer = await push(here, "warm", reference)
        assert (answer.status_code, code_of(answer)) == (403, "image-unauthorized")
        header = {"Volant-Registry-Auth": base64.b64encode(guarded.auth).decode()}
        assert (await push(here, "warm", reference, **header)).status_code == 200
        body = {"reference": reference, "name": "again", "registry_secret": "registry"}
        stored = await here.client.put("/api/v1/secrets/registry", json={"value": guarded.auth.decode()})
        assert stored.is_success, stored.text
        answer = await here.client.post("/api/v1/snapshots/pull", json=body)
        assert answer.status_code == 201, answer.text
        assert PASSWORD not in answer.text
