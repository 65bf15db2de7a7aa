"""`volar images` shows and deletes the images in the daemon's cache, by references or digests."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest

from tests.client.kit import answer, problem, serving

from .kit import volar

DIGEST = f"sha256:{'ab' * 32}"
SHORT = "ab" * 6


def image_view(**more: object) -> dict[str, object]:
    """An image as the API shows it."""
    return {
        "digest": DIGEST, "references": ["registry.test/example/tool:1"], "platform": "linux/amd64",
        "size_bytes": 2**20, "own_bytes": 2**19, "layers": [], "created_at": None, "used_at": "2025-09-24T12:34:56Z",
        "used_by": [], "entrypoint": ["/bin/tool"], "command": [], "env": {}, "user": "", "workdir": "",
        "exposed_ports": [], "stop_signal": "", "labels": {}, "volumes": [], "health_check": None, **more,
    }  # fmt: skip


@pytest.mark.parametrize("words", [["images"], ["images", "list"], ["images", "ls"]])
async def test_images_are_listed(words: list[str]) -> None:
    async with serving() as server:
        server.routes["GET /api/v1/images"] = answer([image_view(used_by=["VM web"])])
        table = await volar(server, *words)
        names = await volar(server, *words, "-q")
        document = await volar(server, *words, "--json")
    title, row = table.out.decode().splitlines()
    assert title.split()[:4] == ["IMAGE", "REFERENCE", "SIZE", "OWN"]
    assert row.split()[:4] == [SHORT, "registry.test/example/tool:1", "1.0", "MiB"]
    assert row.endswith("VM web")
    assert names.out.decode().split() == [SHORT]
    assert json.loads(document.out) == [image_view(used_by=["VM web"])]


CHECK = {
    "command": ["curl -f localhost"], "shell": True, "interval_s": 90.0, "timeout_s": 0.0, "start_period_s": 0.0,
    "retries": 0,
}  # fmt: skip
VIEW = image_view(health_check=CHECK)


async def test_an_image_is_found_by_its_reference_or_digest() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/images"] = [answer([VIEW]), answer([])]
        server.routes[f"GET /api/v1/images/{SHORT}"] = answer(VIEW)
        by_reference = await volar(server, "images", "get", "example/tool:1")
        missing = await volar(server, "images", "get", "example/none")
        by_digest = await volar(server, "images", "get", SHORT)
        documents = [await volar(server, "images", "get", SHORT, *how) for how in (["--json"], ["-o", "json"])]
    assert documents[0].out == documents[1].out
    assert json.loads(documents[0].out) == VIEW
    assert by_reference.out == by_digest.out
    shown = dict(re.split(r": +", line, maxsplit=1) for line in by_digest.out.decode().splitlines())
    assert (shown["entrypoint"], shown["health check"]) == ("/bin/tool", "curl -f localhost, every 1m30s")
    assert missing.code == 1
    assert "volar images pull example/none" in missing.err
    assert server.requests[0].param("reference") == "example/tool:1"


async def test_an_image_is_fetched_with_the_credentials_of_its_registry(tmp_path: Path) -> None:
    authfile = tmp_path / "auth.json"
    authfile.write_text(json.dumps({"auths": {"registry.test": {"auth": "eDp5"}, "other.test": {"auth": "ejp6"}}}))
    async with serving() as server:
        server.routes["GET /api/v1/images/pulls"] = answer([])
        server.routes["POST /api/v1/images/pull"] = answer(image_view())
        done = await volar(server, "images", "pull", "--refresh", "--authfile", str(authfile), "registry.test/tool")
    assert (done.code, done.out) == (0, f"registry.test/tool is {SHORT}, 1.0 MiB\n".encode())
    (asked,) = server.asked("/api/v1/images/pull")
    assert asked.json() == {"reference": "registry.test/tool", "refresh": True}
    assert json.loads(base64.b64decode(asked.headers["volant-registry-auth"])) == {
        "auths": {"registry.test": {"auth": "eDp5"}}
    }


async def test_an_archive_is_sent_as_an_image(tmp_path: Path) -> None:
    archive = tmp_path / "image.tar"
    archive.write_bytes(bytes(100_000))
    async with serving() as server:
        server.routes["PUT /api/v1/images/archive"] = answer(image_view())
        done = await volar(server, "images", "load", str(archive), "example/tool:1")
        missing = await volar(server, "images", "load", str(tmp_path / "none"), "example/tool:1")
    assert done.out.decode() == f"example/tool:1 is {SHORT}, 1.0 MiB\n"
    (asked,) = server.requests
    assert (asked.param("reference"), len(asked.body)) == ("example/tool:1", 100_000)
    assert (missing.code, "none can't be read: No such file" in missing.err) == (1, True)


async def test_images_are_deleted_by_reference_or_digest() -> None:
    async with serving() as server:
        server.routes[f"GET /api/v1/images/{SHORT}"] = answer(image_view())
        server.routes[f"DELETE /api/v1/images/{DIGEST.replace(chr(58), '%3A')}"] = answer(None, 204)
        pruned = {"dry_run": False, "images": [], "references": ["x"], "freed_bytes": 0}
        server.routes["POST /api/v1/images/prune"] = [answer(pruned), problem(404, "image-not-found", "no such image")]
        done = await volar(server, "images", "rm", SHORT, "example/tool:1")
        missing = await volar(server, "images", "delete", "example/none")
    assert done.out.decode().splitlines() == [f"{SHORT} is deleted", "example/tool:1 is deleted"]
    assert missing.code == 3
    assert server.asked("/api/v1/images/prune")[0].param("reference") == "example/tool:1"


async def test_unused_images_are_pruned() -> None:
    async with serving() as server:
        pruned = {"dry_run": True, "images": [image_view()], "references": [], "freed_bytes": 2**19}
        server.routes["POST /api/v1/images/prune"] = answer(pruned)
        done = await volar(server, "images", "prune", "--unused-for", "12h", "--max", "1.5G", "--dry-run")
    assert done.out.decode().splitlines()[-1] == "512.0 KiB would be freed"
    (asked,) = server.requests
    assert dict(asked.query) == {"unused_for": "12h", "max_mb": "1536", "dry_run": "true"}
