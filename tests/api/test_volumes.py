"""Volumes over the wire: made, listed, copied, grown and removed, each whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from tests.api.kit import Api

VOLUMES = "/api/v1/volumes"


def files(path: Path) -> list[Path]:
    return sorted((path / "volumes").iterdir())


async def make(served: Api, name: str = "data", size_mb: int = 64) -> None:
    answer = await served.client.post(VOLUMES, json={"name": name, "size_mb": size_mb})
    assert answer.status_code == 201, answer.text
    assert answer.headers["Location"] == f"{VOLUMES}/{name}"


async def test_a_volume_is_a_sparse_file_with_ext4(served: Api, tmp_path: Path) -> None:
    await make(served, size_mb=1024)
    [file] = files(tmp_path)
    assert (file.stat().st_size, file.stat().st_mode & 0o777) == (2**30, 0o600)
    assert file.stat().st_blocks * 512 < 64 * 2**20
    check = await trio.run_process(["e2fsck", "-fn", str(file)], check=False, capture_stdout=True)
    assert check.returncode == 0, check.stdout
    [shown] = (await served.client.get(VOLUMES)).json()
    assert (shown["name"], shown["status"], shown["size_mb"]) == ("data", "ready", 1024)
    assert shown["used_bytes"] == file.stat().st_blocks * 512
    assert (shown["used_by"], shown["writer"]) == ([], None)
    assert (await served.client.get(f"{VOLUMES}/data")).json() == shown


async def test_a_volume_that_a_vm_names_stays(served: Api, tmp_path: Path) -> None:
    await make(served)
    vm = await served.create("demo", volumes=["data:/var/lib/app:ro"])
    assert vm["volumes"] == ["data:/var/lib/app:ro"]
    refused = await served.client.delete(f"{VOLUMES}/data")
    assert (refused.status_code, "demo" in refused.json()["detail"]) == (409, True)
    assert (await served.client.get(f"{VOLUMES}/data")).json()["used_by"] == ["demo"]
    assert (await served.client.delete("/api/v1/vms/demo")).status_code == 204
    assert len(files(tmp_path)) == 1
    assert (await served.client.delete(f"{VOLUMES}/data")).status_code == 204
    assert not files(tmp_path)
    assert (await served.client.delete(f"{VOLUMES}/data")).status_code == 404


async def test_a_copy_has_the_same_bytes_and_a_grown_one_more(served: Api, tmp_path: Path) -> None:
    await make(served)
    [file] = files(tmp_path)
    with file.open("r+b") as writing:
        writing.seek(-100, 2)
        writing.write(b"mine")
    copied = await served.client.post(f"{VOLUMES}/data/clone", json={"name": "copy"})
    assert (copied.status_code, copied.json()["size_mb"]) == (201, 64)
    [other] = [each for each in files(tmp_path) if each != file]
    assert other.read_bytes() == file.read_bytes()
    grown = await served.client.post(f"{VOLUMES}/copy/resize", json={"size_mb": 128})
    assert (grown.status_code, grown.json()["size_mb"]) == (200, 128)
    assert (other.stat().st_size, file.stat().st_size) == (128 * 2**20, 64 * 2**20)
    shrunk = await served.client.post(f"{VOLUMES}/copy/resize", json={"size_mb": 64})
    assert (shrunk.status_code, shrunk.json()["field"]) == (409, "size_mb")


@pytest.mark.parametrize(
    ("volumes", "status"),
    [
        (["data"], 400),
        (["data:d"], 400),
        (["data:/"], 400),
        (["data:/a/../b"], 400),
        (["data:/proc/x"], 400),
        (["data:/d:rx"], 400),
        (["data:/d:"], 400),
        (["data:/d:ro,"], 400),
        (["data:/d:ro,rw"], 400),
        (["data:/d:nocopy,nocopy"], 400),
        (["/srv/data"], 400),
        (["/srv/data:d"], 400),
        (["/srv/../data:/d"], 400),
        (["/srv//data:/d"], 400),
        (["/srv/data:/d:"], 400),
        (["/srv/data:/d:rx"], 400),
        (["/srv/data:/d", "data:/d"], 422),
        (["/srv/data:/d"], 403),
        (["data:/a\n"], 400),
        (["data:/a", "data:/b"], 422),
        (["data:/a", "more:/a/"], 422),
        ([f"v{number}:/v{number}" for number in range(9)], 400),
        (["gone:/d"], 404),
    ],
)
async def test_what_can_not_be_mounted_is_refused(served: Api, volumes: list[str], status: int) -> None:
    body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128, "volumes": volumes}
    answer = await served.client.post("/api/v1/vms", json=body)
    assert (answer.status_code, answer.json()["field"]) == (status, "volumes"), answer.text


@pytest.mark.parametrize(
    ("volume", "shown"),
    [("data:/d/:rw", "data:/d"), ("data:/d:nocopy", "data:/d:nocopy"), ("data:/d:nocopy,ro", "data:/d:ro,nocopy")],
)
async def test_options_of_a_mount_are_shown(served: Api, volume: str, shown: str) -> None:
    await make(served)
    assert (await served.create("demo", volumes=[volume]))["volumes"] == [shown]


async def test_a_template_has_no_volumes(served: Api) -> None:
    await make(served)
    body = {"name": "demo", "cpu_cores": 1, "memory_mb": 128, "volumes": ["data:/d"], "boot": "template"}
    answer = await served.client.post("/api/v1/vms", json=body)
    assert (answer.status_code, answer.json()["field"]) == (400, "boot")


async def test_df_lists_volumes_and_prune_removes_none(served: Api, tmp_path: Path) -> None:
    await make(served)
    [file] = files(tmp_path)
    lost = file.with_name("00000000000000ff.img")
    lost.write_bytes(b"somebody's work")
    items = [
        each for each in (await served.client.get("/api/v1/system/df")).json()["items"] if each["kind"] == "volume"
    ]
    assert {item["name"]: item["used_by"] for item in items} == {file.name: ["volume data"], lost.name: []}
    assert not any(item["reclaimable"] for item in items)
    answer = await served.client.post("/api/v1/system/prune?kind=volume&dry_run=false")
    assert (answer.status_code, answer.json()["items"]) == (200, []), answer.text
    assert files(tmp_path) == sorted([file, lost])


async def test_a_volume_larger_than_the_disk_is_refused(served: Api) -> None:
    answer = await served.client.post(VOLUMES, json={"name": "huge", "size_mb": 16 * 1024 * 1024})
    assert (answer.status_code, "MiB are left" in answer.json()["detail"]) == (503, True)
    assert (await served.client.get(VOLUMES)).json() == []
