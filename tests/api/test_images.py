"""OCI images over the API: what is shown, what is refused and why, and that credentials stay nowhere."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import os
import tarfile
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from tests.api.kit import Api, Body, api, request, streamed, until
from tests.files import files_with
from tests.oci.kit import BuiltImage, write_layout
from tests.oci.registry import FailingRegistry, auth_file, needs_registry
from tests.oci.test_images import BASE, FIRST, SECOND, busy
from tests.oci.test_resolve import held
from tests.web_server import answer as respond
from volant.http import ApiSettings
from volant.images import Origins
from volant.model import EventType, Manifest, OciImage
from volant.oci import OciError, read_auth

pytestmark = [pytest.mark.programs, needs_registry]

USER, WORD = "puller", "hush-c0ffee-registry"
"""As `Held` asks for them."""


@pytest.fixture
def image(tmp_path: Path) -> BuiltImage:
    return write_layout(
        tmp_path / "layout",
        [BASE, FIRST],
        Cmd=["first"],
        ExposedPorts={"80/tcp": {}},
        Env=["A=b"],
        Volumes={"/data": {}},
    )


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Api]:
    (tmp_path / "daemon").mkdir()
    async with api(tmp_path / "daemon", origins=Origins((tmp_path,))) as running:
        yield running


def file(image: BuiltImage) -> str:
    return f"oci:{image.layout}:t"


async def pulled(served: Api, reference: str, **headers: str) -> dict[str, Any]:
    answer = await served.client.post("/api/v1/images/pull", json={"reference": reference}, headers=headers)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


async def listed(served: Api, **query: str) -> list[str]:
    return [one["digest"] for one in (await served.client.get("/api/v1/images", params=query)).json()]


def used_by_every_vm(monkeypatch: pytest.MonkeyPatch, digest: str) -> None:
    monkeypatch.setattr(Manifest, "image", OciImage(reference="app", digest=digest))


async def test_an_image_is_fetched_shown_and_deleted(served: Api, image: BuiltImage) -> None:
    view = await pulled(served, file(image))
    assert view["digest"] == image.digest
    assert view["references"] == [file(image)]
    assert (view["command"], view["entrypoint"], view["env"]) == (["first"], [], {"A": "b"})
    assert (view["exposed_ports"], view["volumes"]) == ([{"port": 80, "protocol": "tcp"}], ["/data"])
    assert [layer["diff_id"] for layer in view["layers"]] == image.diff_ids
    assert view["own_bytes"] == view["size_bytes"] > sum(layer["size_bytes"] for layer in view["layers"]) > 200_000
    assert (await served.client.get("/api/v1/images")).json() == [view]
    for digest in (image.digest, image.digest[7:], image.digest[7:13]):
        assert (await served.client.get(f"/api/v1/images/{digest}")).json() == view
    assert await listed(served, reference=file(image)) == [image.digest]
    assert await listed(served, reference="other") == []
    assert (await served.client.delete(f"/api/v1/images/{image.digest[7:19]}")).status_code == 204
    assert await listed(served) == []
    for method in ("GET", "DELETE"):
        answer = await served.client.request(method, f"/api/v1/images/{image.digest}")
        assert (answer.status_code, answer.json()["type"]) == (404, "urn:volant:error:image-not-found")
    answer = await served.client.get("/api/v1/images/xyz")
    assert (answer.status_code, answer.json()["field"]) == (400, "digest")


async def test_credentials_are_used_and_stay_nowhere(
    tmp_path: Path, image: BuiltImage, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("tests.oci.test_resolve.PASSWORD", WORD)
    word = base64.b64encode(f"{USER}:{WORD}".encode()).decode()
    monkeypatch.setattr("tests.oci.test_resolve._WORD", f"Basic {word}")
    (tmp_path / "daemon").mkdir()
    said = []
    with held(image) as registry:
        address = registry.server.address
        header = base64.b64encode(registry.auth).decode()
        wrong = base64.b64encode(auth_file(address, f"wrong-{WORD}")).decode()
        secrets = [WORD, word, header, wrong]
        async with api(tmp_path / "daemon", plain_http=[address]) as served:
            for given, status in ((None, 403), (wrong, 403), ("%", 400), (header[:-9], 400)):
                headers = {} if given is None else {"Volant-Registry-Auth": given}
                answer = await served.client.post(
                    "/api/v1/images/pull", json={"reference": f"{address}/app:t"}, headers=headers
                )
                assert answer.status_code == status, answer.text
                said.append(answer.text)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: pulled(served, f"{address}/app:t", **{"Volant-Registry-Auth": header}))
                await registry.asked.wait()
                (pull,) = (await served.client.get("/api/v1/images/pulls")).json()
                assert (pull["reference"], pull["digest"], pull["phase"]) == (
                    f"{address}/app:t", image.digest, "fetching",
                )  # fmt: skip
                assert (pull["layers_done"], pull["layers_total"], pull["waiting"]) == (0, 2, 1)
                said.append(json.dumps(pull))
                # They are in memory, for skopeo, and nowhere else.
                assert {path.name for path in files_with(tmp_path / "daemon", map(str.encode, secrets))} == {
                    "auth.json"
                }
                registry.server.released.set()
            said += [(await served.client.get(path)).text for path in ("/api/v1/images", "/api/v1/system/info")]
            async with streamed(served.server, "/api/v1/events/images?since=0") as body:
                said.append((await first_events(body, EventType.IMAGE_PULLED)).decode())
    assert not files_with(tmp_path / "daemon", map(str.encode, secrets))
    said += [record.getMessage() for record in caplog.records]
    assert len(said) > 10
    assert not [text for text in said for secret in secrets if secret in text]


async def test_a_secret_can_have_the_credentials(tmp_path: Path, image: BuiltImage) -> None:
    (tmp_path / "daemon" / "disks").mkdir(parents=True)
    with held(image) as registry:
        registry.server.released.set()
        reference = f"{registry.server.address}/app:t"
        word = json.loads(registry.auth)["auths"][registry.server.address]["auth"]
        async with api(tmp_path / "daemon", plain_http=[registry.server.address]) as served:
            for name, value in (("hub", registry.auth.decode()), ("other", "hunter2")):
                answer = await served.client.put(f"/api/v1/secrets/{name}", json={"value": value})
                assert answer.status_code == 200, answer.text
            body = {"reference": reference, "registry_secret": "hub"}
            header = {"Volant-Registry-Auth": base64.b64encode(registry.auth).decode()}
            for given, headers, status in (
                ({"registry_secret": "none"}, {}, 404),
                ({"registry_secret": "other"}, {}, 400),
                ({}, header, 422),
            ):
                answer = await served.client.post("/api/v1/images/pull", json=body | given, headers=headers)
                assert (answer.status_code, answer.json()["field"]) == (status, "registry_secret")
                assert "hunter2" not in answer.text
            vm = {"name": "demo", "image": reference, "registry_secret": "hub"}
            made = await served.client.post("/api/v1/vms", json=vm)
            assert made.status_code == 201, made.text
            answer = await served.client.post("/api/v1/images/pull", json=body)
            assert (answer.status_code, answer.json()["digest"]) == (200, image.digest)
            plain = await served.client.post("/api/v1/vms", json={"name": "x", "registry_secret": "hub"})
            assert (plain.status_code, plain.json()["field"]) == (422, "registry_secret")
    assert not files_with(tmp_path / "daemon", [word.encode(), registry.auth])


async def test_the_next_daemon_fetches_the_image_of_a_vm_with_its_secret(tmp_path: Path, image: BuiltImage) -> None:
    (tmp_path / "daemon" / "disks").mkdir(parents=True)
    with held(image) as registry:
        address = registry.server.address
        async with api(tmp_path / "daemon", plain_http=[address]) as served:
            answer = await served.client.put("/api/v1/secrets/hub", json={"value": registry.auth.decode()})
            assert answer.status_code == 200, answer.text
            vm = {"name": "demo", "image": f"{address}/app:t", "registry_secret": "hub"}
            made = await served.client.post("/api/v1/vms", json=vm)
            assert made.status_code == 201, made.text
            await registry.asked.wait()
        registry.server.released.set()
        async with api(tmp_path / "daemon", plain_http=[address]) as served:
            assert (await served.client.get("/api/v1/images")).json() == []
            # As its boot does. No guest boots here.
            (row,) = served.deps.store.projection.rows()
            await served.deps.vms.templates.files.fetch_root(row)
            (found,) = (await served.client.get("/api/v1/images")).json()
            assert found["digest"] == image.digest
            # While the image is there, nobody needs the secret.
            assert (await served.client.delete("/api/v1/secrets/hub")).status_code == 204
            await served.deps.vms.templates.files.fetch_root(row)
    assert not files_with(tmp_path / "daemon", [registry.auth])


async def test_a_private_image_of_one_project_is_none_of_another(tmp_path: Path, image: BuiltImage) -> None:
    in_web = {"Volant-Project": "web"}
    (tmp_path / "daemon").mkdir()
    with held(image) as registry:
        registry.server.released.set()
        name = f"{registry.server.address}/app:t"
        credentials = {"Volant-Registry-Auth": base64.b64encode(registry.auth).decode()}
        async with api(tmp_path / "daemon", plain_http=[registry.server.address]) as served:
            assert (await served.client.post("/api/v1/projects", json={"name": "web"})).status_code == 201
            await pulled(served, name, **credentials)
            answer = await served.client.post("/api/v1/images/pull", json={"reference": name}, headers=in_web)
            assert (answer.status_code, answer.json()["type"]) == (403, "urn:volant:error:image-unauthorized")
            vm = {"name": "demo", "image": name}
            assert (await served.client.post("/api/v1/vms", json=vm, headers=in_web)).status_code == 403
            assert (await served.client.get("/api/v1/images", headers=in_web)).json() == []
            assert (await served.client.get(f"/api/v1/images/{image.digest}", headers=in_web)).status_code == 404
            assert (await served.client.delete(f"/api/v1/images/{image.digest}", headers=in_web)).status_code == 404
            sent = registry.layers_sent
            view = await pulled(served, name, **credentials, **in_web)
            assert (view["digest"], registry.layers_sent) == (image.digest, sent)
            # Each removes its own name; with the last one the image goes.
            answer = await served.client.delete(f"/api/v1/images/{image.digest}?project=default")
            assert answer.status_code == 204
            assert await listed(served, project="default") == []
            assert await listed(served, project="web") == [image.digest]
            assert (await served.client.delete(f"/api/v1/images/{image.digest}?project=web")).status_code == 204
            assert await listed(served) == []


async def test_an_archive_takes_a_name_in_its_own_project_alone(served: Api, tmp_path: Path, image: BuiltImage) -> None:
    assert (await served.client.post("/api/v1/projects", json={"name": "web"})).status_code == 201
    other = write_layout(tmp_path / "other", [BASE, SECOND])
    for layout, path, query in ((image, "archive", ""), (other, "archive/", "&project=web")):
        archive = tmp_path / f"{layout.digest[7:19]}.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(layout.layout, ".")
        answer = await served.client.put(
            f"/api/v1/images/{path}?reference=team/app:1{query}",
            content=archive.read_bytes(),
            headers={"Content-Type": "application/octet-stream"},
        )
        assert answer.status_code == 201, answer.text
    assert await listed(served, reference="team/app:1") == [image.digest]
    assert await listed(served, reference="team/app:1", project="web") == [other.digest]
    records = (await served.client.get("/api/v1/audit?operation=put_image")).json()
    assert [(record["project"], record["outcome"]) for record in records] == [
        (project, outcome) for project in ("default", "web") for outcome in ("begun", "done")
    ]


async def test_a_name_is_pruned_and_its_image_stays_while_another_project_has_it(
    served: Api, image: BuiltImage
) -> None:
    assert (await served.client.post("/api/v1/projects", json={"name": "web"})).status_code == 201
    for project in ("default", "web"):
        await pulled(served, file(image), **{"Volant-Project": project})
    for project, digests in (("web", []), ("default", [image.digest])):
        params = {"reference": file(image), "project": project}
        answer = (await served.client.post("/api/v1/images/prune", params=params)).json()
        assert [each["digest"] for each in answer["images"]] == digests
        assert (answer["references"], answer["freed_bytes"] > 0) == ([] if digests else [file(image)], bool(digests))


async def first_events(body: Body, last: EventType) -> bytes:
    """Returns the stream up to and with the first event of a type."""
    found = b""
    with trio.fail_after(30):
        while f"event: {last}".encode() not in found or not found.endswith(b"\n\n"):
            found += await body.more()
    return found


async def test_events_tell_of_a_fetch_and_not_of_vms(served: Api, image: BuiltImage) -> None:
    await pulled(served, file(image))
    await served.crashed("demo")
    async with streamed(served.server, "/api/v1/events/images?since=0") as body:
        blocks = [
            json.loads(line.removeprefix(b"data: "))
            for line in (await first_events(body, EventType.IMAGE_PULLED)).splitlines()
            if line.startswith(b"data: ")
        ]
    assert [one["type"] for one in blocks][:: len(blocks) - 1] == ["IMAGE_PULL_STARTED", "IMAGE_PULLED"]
    assert blocks[0]["image"]["reference"] == file(image)
    done = blocks[-1]["image"]
    assert done["layers_done"] == done["layers_total"] == len(image.blobs)
    assert done["done_bytes"] == done["total_bytes"] > 0
    assert {(one["image"]["digest"], one["vm_id"], one["name"], one["status"]) for one in blocks} == {
        (image.digest, 0, "", None)
    }
    async with streamed(served.server, "/api/v1/events/vms?since=0") as body:
        assert b"IMAGE" not in await first_events(body, EventType.VM_CRASHED)
    metrics = (await served.client.get("/metrics")).text
    assert 'volant_image_events_total{type="IMAGE_PULLED"} 1.0' in metrics
    assert 'volant_vm_events_total{type="IMAGE_PULLED"}' not in metrics
    answer = await served.client.get("/api/v1/events/images?types=VM_CREATED")
    assert (answer.status_code, answer.json()["field"]) == (400, "types")


async def test_a_fetch_that_fails_is_an_event_and_an_answer(tmp_path: Path, image: BuiltImage) -> None:
    (image.layout / "blobs/sha256" / image.blobs[1][7:]).unlink()
    (tmp_path / "daemon").mkdir()

    def missing(request: BaseHTTPRequestHandler) -> bool:
        if request.path.endswith(image.blobs[1]):
            respond(request, 404, b"{}")
            return True
        return False

    with FailingRegistry(image.layout, missing) as server:
        async with api(tmp_path / "daemon", plain_http=[server.address]) as served:
            answer = await served.client.post("/api/v1/images/pull", json={"reference": f"{server.address}/app:t"})
            assert answer.status_code in (404, 503), answer.text
            async with streamed(served.server, "/api/v1/events/images?since=0") as body:
                found = await first_events(body, EventType.IMAGE_PULL_FAILED)
            assert answer.json()["type"].rpartition(":")[2].encode() in found


@pytest.mark.parametrize(
    ("body", "status", "code", "field"),
    [
        ({"reference": ""}, 400, "invalid-request", "reference"),
        ({"reference": "No/Upper"}, 400, "invalid-image-reference", "reference"),
        ({"reference": "https://x/y"}, 400, "invalid-image-reference", "reference"),
        ({"reference": "oci:/nowhere"}, 403, "image-not-allowed", "reference"),
        ({"reference": "a", "more": 1}, 400, "invalid-request", "more"),
        ({}, 400, "invalid-request", "reference"),
        ({"reference": "127.0.0.1:1/app"}, 503, "registry-unreachable", "reference"),
    ],
)
async def test_what_is_refused_says_why(served: Api, body: dict[str, Any], status: int, code: str, field: str) -> None:
    answer = await served.client.post("/api/v1/images/pull", json=body)
    problem = answer.json()
    assert (answer.status_code, problem["type"], problem["field"]) == (status, f"urn:volant:error:{code}", field)


async def test_a_busy_registry_says_when_to_try_again(tmp_path: Path, image: BuiltImage) -> None:
    (tmp_path / "daemon").mkdir()
    with FailingRegistry(image.layout, busy) as server:
        async with api(tmp_path / "daemon", plain_http=[server.address]) as served:
            answer = await served.client.post(
                "/api/v1/images/pull", json={"reference": f"{server.address}/app:t"}, timeout=60
            )
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "60")
    assert answer.json()["type"] == "urn:volant:error:registry-busy"
    assert "wait a while" in answer.json()["hint"]


async def test_an_image_that_a_vm_uses_stays(served: Api, image: BuiltImage, monkeypatch: pytest.MonkeyPatch) -> None:
    await pulled(served, file(image))
    used_by_every_vm(monkeypatch, image.digest)
    await served.crashed("demo")
    (view,) = (await served.client.get("/api/v1/images")).json()
    assert view["used_by"] == ["VM demo"]
    answer = await served.client.delete(f"/api/v1/images/{image.digest}")
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:volant:error:image-in-use")
    assert "VM demo" in answer.json()["detail"]
    assert (await served.client.post("/api/v1/images/prune")).json()["images"] == []
    answer = await served.client.post("/api/v1/images/prune", params={"reference": file(image)})
    assert (answer.json()["images"], answer.json()["references"]) == ([], [file(image)])
    (view,) = (await served.client.get("/api/v1/images")).json()
    assert view["references"] == []
    assert (await served.client.delete("/api/v1/vms/demo")).status_code == 204
    await until(lambda: len(served.deps.store.projection) == 0)
    assert (await served.client.delete(f"/api/v1/images/{image.digest}")).status_code == 204


async def test_images_are_pruned_by_size_and_by_reference(served: Api, tmp_path: Path, image: BuiltImage) -> None:
    old = await pulled(served, file(image))
    other = write_layout(tmp_path / "other", [BASE, SECOND])
    new = await pulled(served, file(other))
    cache = tmp_path / "daemon/cache/oci"
    os.utime(cache / "images" / image.digest[7:] / "image.json", (1e9, 1e9))
    for dry_run in (True, False):
        answer = await served.client.post(
            "/api/v1/images/prune", params={"max_mb": 0, "unused_for": "1h", "dry_run": dry_run}
        )
        found = answer.json()
        assert [one["digest"] for one in found["images"]] == [old["digest"]]
        # The base is the other image's, too.
        assert 0 < found["freed_bytes"] < 100_000
    assert await listed(served) == [new["digest"]]
    answer = await served.client.post("/api/v1/images/prune", params={"max_mb": 1})
    assert answer.json()["images"] == []
    answer = await served.client.post("/api/v1/images/prune", params={"reference": file(other)})
    assert [one["digest"] for one in answer.json()["images"]] == [new["digest"]]
    assert await listed(served) == []
    assert not list((cache / "layers").iterdir())
    answer = await served.client.post("/api/v1/images/prune", params={"reference": file(other)})
    assert answer.status_code == 404


async def test_a_fetch_goes_on_when_its_client_leaves(tmp_path: Path, image: BuiltImage) -> None:
    (tmp_path / "daemon").mkdir()
    with held(image) as registry:
        reference = f"{registry.server.address}/app:t"
        header = {"Volant-Registry-Auth": base64.b64encode(registry.auth).decode()}
        async with api(tmp_path / "daemon", plain_http=[registry.server.address]) as served:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: pulled(served, reference, **header))
                await registry.asked.wait()
                nursery.cancel_scope.cancel()
            registry.server.released.set()
            # Without credentials: it joins the fetch, or finds the image.
            with trio.fail_after(30):
                while not (found := await listed(served, reference=reference)):
                    for fetch in list(images_of(served)._under_way.values()):
                        await fetch.done.wait()
            assert found == [image.digest]
            assert registry.layers_sent == 1


def images_of(served: Api) -> Any:
    service: Any = served.deps.oci
    return service._images


async def test_files_of_the_host_can_be_named_below_artifact_dirs(tmp_path: Path, image: BuiltImage) -> None:
    (tmp_path / "daemon").mkdir()
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown/way-out").symlink_to(image.layout)
    inside = write_layout(tmp_path / "shown/inside", [FIRST])
    key = "k" * 20
    settings = ApiSettings(api_keys=(key,))
    async with api(tmp_path / "daemon", settings, origins=Origins((tmp_path / "shown",))) as served:
        served.client.headers["X-Volant-API-Key"] = key
        refused = (image.layout, tmp_path / "shown/way-out")
        for path, status in (*((path, 403) for path in refused), (tmp_path / "shown/none", 404), (inside.layout, 200)):
            answer = await served.client.post("/api/v1/images/pull", json={"reference": f"oci:{path}:t"})
            assert answer.status_code == status, answer.text
            assert status != 403 or answer.json()["type"] == "urn:volant:error:image-not-allowed"
            # Nor can a plugin bring it.
            boot = {"image": {"reference": f"oci:{path}:t", "digest": "sha256:" + "0" * 64}}
            name = f"plugin-{status}-{path.name}"
            installed = await served.client.post("/api/v1/plugins", json={"name": name, "boot": boot})
            assert (installed.status_code == 403) == (status == 403), installed.text


async def archive(image: BuiltImage, path: Path, kind: str) -> bytes:
    target = f"{kind}:{path}" + (":whatever:t" if kind == "docker-archive" else ":t")
    await trio.run_process(["skopeo", "copy", "--quiet", f"oci:{image.layout}:t", target])
    return await trio.Path(path).read_bytes()


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive", "compressed"])
async def test_an_archive_is_sent_and_has_a_name_then(
    served: Api, tmp_path: Path, image: BuiltImage, kind: str
) -> None:
    data = await archive(image, tmp_path / "archive", "docker-archive" if kind == "compressed" else kind)
    if kind == "compressed":
        data = gzip.compress(data)
    answer = await served.client.put("/api/v1/images/archive?reference=team/app:1", content=data)
    assert answer.status_code == 201, answer.text
    view = answer.json()
    assert [name.partition("/")[2] for name in view["references"]] == ["team/app:1"]
    assert [layer["diff_id"] for layer in view["layers"]] == image.diff_ids
    # The name is known, so no registry is asked.
    assert (await pulled(served, "team/app:1"))["digest"] == view["digest"]
    assert left_of(tmp_path) == []


async def test_an_archive_that_is_none_or_cut_off_leaves_nothing(
    served: Api, tmp_path: Path, image: BuiltImage
) -> None:
    data = await archive(image, tmp_path / "archive", "oci-archive")
    for content in (b"", b"no archive", data[: len(data) // 2], data[700:]):
        answer = await served.client.put("/api/v1/images/archive?reference=app", content=content)
        assert answer.status_code == 422, answer.text
        assert str(tmp_path) not in answer.text
    for query in ("", "?reference=", "?reference=UPPER", f"?reference=app@{image.digest}", "?reference=oci:/x"):
        answer = await served.client.put(f"/api/v1/images/archive{query}", content=data)
        assert (answer.status_code, answer.json()["field"]) == (400, "reference"), answer.text
    async with await served.server.connect() as stream:
        head = request("PUT", "/api/v1/images/archive?reference=app", Content_Length=str(len(data)))
        await stream.send_all(head + data[:200_000])
        await until(lambda: len(left_of(tmp_path)) == 1)
    await until(lambda: left_of(tmp_path) == [])
    assert await listed(served) == []


def left_of(tmp_path: Path) -> list[Path]:
    work = tmp_path / "daemon" / "cache" / "oci" / "work"
    return list(work.iterdir()) if work.exists() else []


async def test_an_archive_has_a_limit(served: Api, image: BuiltImage) -> None:
    await listed(served)
    images = images_of(served)
    images._limits = msgspec.structs.replace(images._limits, max_bytes=1000)
    answer = await served.client.put("/api/v1/images/archive?reference=app", content=bytes(1001))
    assert (answer.status_code, answer.json()["type"]) == (422, "urn:volant:error:image-too-large")


def test_of_an_auth_file_only_credentials_are_used() -> None:
    given = {
        "auths": {"registry:5000": {"auth": "eDp5", "email": "x"}},
        "credHelpers": {"registry:5000": "x/../../evil"},
        "credsStore": "evil",
    }
    for encode in (base64.b64encode, base64.urlsafe_b64encode, lambda data: base64.b64encode(data).rstrip(b"=")):
        found = msgspec.json.decode(read_auth(encode(json.dumps(given).encode()).decode()))
        assert found == {"auths": {"registry:5000": {"auth": "eDp5"}}}
    for wrong in (
        "",
        "x",
        "e30!",
        base64.b64encode(b"[]").decode(),
        base64.b64encode(b'{"auths":{"a":{"auth":7}}}').decode(),
        "A" * 70000,
    ):
        with pytest.raises(OciError) as caught:
            read_auth(wrong)
        assert caught.value.code == "bad_credentials"
