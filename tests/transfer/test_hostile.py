"""Nothing that a registry says of a snapshot is believed: each lie is refused, by its name, and leaves nothing."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import zstandard

from tests.api.kit import Api
from tests.oci.kit import write_layout
from tests.oci.registry import Registry, needs_registry
from tests.oci.test_images import BASE, FIRST
from tests.transfer.kit import PIECE, code_of, host, left_by_pulls, pull, push, take
from volant.model import OciImage

pytestmark = [pytest.mark.programs, needs_registry]

DIGEST = "0123456789abcdef" * 4
NAME = "tests/hostile"


class Pushed:
    """A snapshot in a registry, of which others are made that are wrong."""

    def __init__(self, registry: Registry) -> None:
        self.reference = f"{registry.address}/{NAME}"
        self._client = httpx.Client(base_url=f"http://{registry.address}/v2/{NAME}/", trust_env=False)

    def close(self) -> None:
        self._client.close()

    def read(self) -> None:
        """Gets what was pushed."""
        accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
        self.manifest = self._client.get("manifests/good", headers=accept).raise_for_status().json()
        self.document = self._client.get(f"blobs/{self.manifest['config']['digest']}").raise_for_status().json()

    def blob(self, data: bytes) -> dict[str, Any]:
        """Puts a blob; returns digest and size."""
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        place = self._client.post("blobs/uploads/").raise_for_status().headers["location"]
        self._client.put(f"{place}&digest={digest}", content=data).raise_for_status()
        return {"digest": digest, "size": len(data)}

    def put(self, document: Any, manifest: dict[str, Any]) -> str:
        """Puts a snapshot; returns its reference."""
        manifest["config"] |= self.blob(document if isinstance(document, bytes) else json.dumps(document).encode())
        return self.put_manifest(manifest)

    def put_manifest(self, manifest: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/vnd.oci.image.manifest.v1+json"}
        self._client.put("manifests/bad", content=json.dumps(manifest), headers=headers).raise_for_status()
        return f"{self.reference}:bad"


@pytest.fixture
async def there(registry: Registry, tmp_path: Path) -> AsyncIterator[Api]:
    async with host(tmp_path / "there", registry.address) as running:
        yield running


@pytest.fixture
async def pushed(registry: Registry, tmp_path: Path) -> AsyncIterator[Pushed]:
    found = Pushed(registry)
    async with host(tmp_path / "here", registry.address) as here:
        await take(here, "warm", "abc", volume=b"v" * PIECE * 4)
        answer = await push(here, "warm", f"{found.reference}:good")
        assert answer.status_code == 200, answer.text
    found.read()
    yield found
    found.close()


async def refused(there: Api, reference: str) -> tuple[int, str]:
    answer = await pull(there, reference)
    assert (await there.client.get("/api/v1/snapshots")).json() == []
    return answer.status_code, code_of(answer)


def put(*path: str | int, value: Any) -> Callable[[Any], None]:
    """Returns what sets a member of a document."""

    def change(document: Any) -> None:
        for part in path[:-1]:
            document = document[part]
        document[path[-1]] = value

    return change


def huge(document: Any) -> None:
    chunk_bytes = 64 * 2**20
    pieces = 2**40 // 2 // chunk_bytes
    document["files"]["chunk_bytes"] = chunk_bytes
    document["files"]["chunks"] = document["files"]["chunks"][:1]
    document["files"]["files"] = [
        {"name": "memory", "size": 2**39, "pieces": [0] * pieces},
        {"name": "state", "size": chunk_bytes, "pieces": [0]},
    ]
    document["vm"] |= {"memory_mb": 2**19, "volumes": []}


def disk_alone(document: Any) -> None:
    """As of a VM at rest, which moves between hosts of a fleet and comes from no registry."""
    del document["machine"]
    document["files"] |= {"chunks": [], "files": []}


INVALID, UNFIT = (422, "snapshot-invalid"), (422, "snapshot-unfit")
LIES: dict[str, tuple[Callable[[Any], None], tuple[int, str]]] = {
    "a format of the future": (put("version", value=2), (422, "snapshot-unsupported")),
    "another architecture": (put("architecture", value="aarch64"), UNFIT),
    "no machine": (lambda document: document.pop("machine"), INVALID),
    "no memory": (disk_alone, INVALID),
    "another accelerator": (put("machine", "accelerator", value="kvm"), UNFIT),
    "no accelerator": (put("machine", "accelerator", value="x"), INVALID),
    "a newer QEMU": (put("machine", "version", value="99.0.0"), UNFIT),
    "a long number": (put("machine", "version", value="9" * 5000), INVALID),
    "an unknown machine": (put("machine", "machine", value="pc-q35-1.0"), UNFIT),
    "other devices": (put("machine", "devices", value=99), UNFIT),
    "another CPU": (put("machine", "tsc_khz", value=1_800_000), UNFIT),
    "a file elsewhere": (put("files", "files", 0, "name", value="../../../etc/passwd"), INVALID),
    "a file twice": (put("files", "files", 1, "name", value="memory"), INVALID),
    "odd chunks": (put("files", "chunk_bytes", value=PIECE + 1), INVALID),
    "a piece that is no chunk": (put("files", "files", 0, "pieces", 0, value=10_000), INVALID),
    "a chunk twice": (lambda document: document["files"]["chunks"].append(document["files"]["chunks"][0]), INVALID),
    "a digest that is a path": (put("files", "chunks", 0, value="../" * 21 + "x"), INVALID),
    "a chunk with another digest": (put("files", "chunks", 0, value=DIGEST), (422, "chunk-mismatch")),
    "other memory than it has": (put("vm", "memory_mb", value=128), INVALID),
    "half a TiB of memory": (huge, (422, "snapshot-too-large")),
    "no id": (put("vm", "id", value="x"), INVALID),
    "a time without a zone": (put("vm", "created_at", value="2026-01-01T00:00:00"), INVALID),
    "a name that is a path": (put("vm", "name", value="../x"), INVALID),
    "a plugin that is a path": (put("vm", "plugin", value="/x"), INVALID),
    "a name of its own that is a path": (put("name", value=".."), INVALID),
    "labels that are none": (put("labels", value={"=": "x"}), INVALID),
    "a manifest that is none": (put("vm", "manifest", value={"name": "base", "runtime": "../x"}), INVALID),
    "a disk without one": (put("vm", "manifest", "boot", value={"rootfs": {"url": "/x", "sha256": DIGEST}}), INVALID),
    "a secret elsewhere": (put("vm", "secrets", value=[{"name": "x", "path": "/etc/shadow"}]), INVALID),
    "a volume elsewhere": (put("vm", "volumes", 0, "path", value="../x"), INVALID),
    "a volume without a file": (put("vm", "volumes", value=[]), INVALID),
    "rules that are none": (put("vm", "egress", value={"allow": [{"cidr": "1.2.3.4; drop"}]}), INVALID),
    "a wrong command line": (put("vm", "kernel_cmdline", value="quiet\ninit=/x"), INVALID),
    "a boot image that is nowhere": (put("bases", "boot_image", value=DIGEST), (409, "base-missing")),
    "another kernel": (put("bases", "kernel", value=DIGEST), (409, "base-mismatch")),
    "a root filesystem that is nowhere": (
        put("vm", "manifest", "boot", value={"kernel": {"url": "/x", "sha256": DIGEST}}),
        (409, "base-missing"),
    ),
}


async def test_a_document_that_lies_is_refused(pushed: Pushed, there: Api) -> None:
    for lie, (change, expected) in LIES.items():
        document = copy.deepcopy(pushed.document)
        change(document)
        manifest = copy.deepcopy(pushed.manifest)
        manifest["layers"] = manifest["layers"][: len(document["files"]["chunks"])]
        assert (lie, *await refused(there, pushed.put(document, manifest))) == (lie, *expected)
    # One was found out when a chunk had arrived.
    assert len(left_by_pulls(there)) == 1


async def test_an_error_names_the_digest_of_what_is_lacking_and_how_to_get_it(pushed: Pushed, there: Api) -> None:
    document = copy.deepcopy(pushed.document)
    document["bases"]["boot_image"] = DIGEST
    answer = (await pull(there, pushed.put(document, pushed.manifest))).json()
    assert DIGEST in answer["detail"]
    assert "boot image" in answer["detail"]
    assert "/cache/images" in answer["hint"]


async def test_a_document_that_is_none_is_refused(pushed: Pushed, there: Api) -> None:
    for document in (b"", b"{", b"[]", b"[" * 100_000, b"\xff", b'{"version": "1"}'):
        assert await refused(there, pushed.put(document, pushed.manifest)) == INVALID


async def test_a_chunk_that_grows_without_end_is_refused(pushed: Pushed, there: Api) -> None:
    bomb = pushed.blob(zstandard.ZstdCompressor().compress(bytes(2**28)))
    # Says that it is small, and is not.
    block = ((128 * 1024 - 1) << 3 | 2).to_bytes(3, "little") + b"x"
    liar = pushed.blob(b"\x28\xb5\x2f\xfd\xa0" + PIECE.to_bytes(4, "little") + block * 10_000)
    for blob in (bomb, liar):
        manifest = copy.deepcopy(pushed.manifest)
        manifest["layers"][0] |= blob
        expected = (422, "chunk-mismatch") if blob["size"] < PIECE else INVALID
        assert await refused(there, pushed.put(pushed.document, manifest)) == expected


async def test_a_manifest_that_lies_is_refused(pushed: Pushed, there: Api) -> None:
    for number, (change, expected) in enumerate(
        (
            (put("config", "size", value=2**30), INVALID),
            (put("config", "mediaType", value="application/json"), INVALID),
            (put("layers", 0, "mediaType", value="application/octet-stream"), (422, "snapshot-unsupported")),
            (put("artifactType", value="application/x"), (422, "snapshot-unsupported")),
            (lambda manifest: manifest["layers"].pop(), INVALID),
            (put("layers", 0, "size", value=2**30), INVALID),
            (put("layers", 0, "size", value=1), (422, "image-mismatch")),
        )
    ):
        manifest = copy.deepcopy(pushed.manifest)
        change(manifest)
        assert (number, *await refused(there, pushed.put_manifest(manifest))) == (number, *expected)


async def test_a_host_without_room_refuses(pushed: Pushed, there: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(there.deps.host.disk, "free", lambda path: 2**28)
    assert await refused(there, f"{pushed.reference}:good") == (507, "disk-full")


async def test_an_oci_image_is_fetched_by_its_digest_and_has_to_be_the_same_to_the_byte(
    registry: Registry, tmp_path: Path
) -> None:
    layout = write_layout(tmp_path / "layout", [BASE, FIRST], Cmd=["first"]).layout
    registry.push(layout, "tests/app:t")
    pushed = Pushed(registry)
    name = f"{registry.address}/tests/app"
    options = {"plain_http": [registry.address]}
    async with host(tmp_path / "here", registry.address, **options) as here:
        answer = await here.client.post("/api/v1/images/pull", json={"reference": f"{name}:t"}, timeout=60)
        digest = answer.raise_for_status().json()["digest"]
        await take(here, "warm", "ab", image=OciImage(reference=f"{name}:t", digest=digest))
        assert (await push(here, "warm", f"{pushed.reference}:good")).status_code == 200
    pushed.read()
    assert len(pushed.document["bases"]["image_files"]) == 3
    async with host(tmp_path / "there", registry.address, **options) as there:
        for change, expected, said in (
            (put("bases", "image_files", 1, value=DIGEST), "base-mismatch", digest),
            (put("vm", "manifest", "boot", "image", "digest", value=f"sha256:{DIGEST}"), "base-missing", DIGEST),
            (put("vm", "manifest", "boot", "image", "reference", value="oci:/x"), None, ""),
        ):
            document = copy.deepcopy(pushed.document)
            change(document)
            answer = await pull(there, pushed.put(document, pushed.manifest))
            if expected is None:
                # The host has it by now, wherever it was from.
                assert answer.status_code == 201, answer.text
            else:
                assert code_of(answer) == expected
                assert said in answer.json()["detail"]
    pushed.close()
