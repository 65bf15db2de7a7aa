"""Host directories over the wire: what may be named, and what a VM with one can't do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.kit import Api, api

VM = {"name": "demo", "cpu_cores": 1, "memory_mb": 128}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Api]:
    for name in ("shared/data", "shared/drop"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "shared/file").touch()
    (tmp_path / "shared/link").symlink_to(tmp_path / "shared/data")
    async with api(tmp_path) as running:
        yield running


async def create(served: Api, *volumes: str, **fields: object) -> tuple[int, dict[str, Any]]:
    answer = await served.client.post("/api/v1/vms", json={**VM, "volumes": volumes, **fields})
    return answer.status_code, answer.json()


async def test_a_directory_is_shown_with_its_mode_and_read_only_by_default(served: Api, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    status, vm = await create(served, f"{shared}/drop:/z:rw", f"{shared}/data:/a/b", f"{shared}:/a:ro")
    assert status == 201, vm
    assert vm["volumes"] == [f"{shared}:/a:ro", f"{shared}/drop:/z:rw", f"{shared}/data:/a/b:ro"]
    status, problem = await create(served, f"{shared}:/a", name="clone", boot="template")
    assert (status, problem["field"]) == (400, "boot")


@pytest.mark.parametrize(
    ("source", "mode", "status", "code", "why"),
    [
        ("shared/data", ":rw", 403, "denied", "VMs may only read"),
        ("elsewhere", "", 403, "denied", "allowed are "),
        ("shared-too", "", 403, "denied", "allowed are "),
        ("shared/gone", "", 409, "missing", "it does not exist"),
        ("shared/file", "", 409, "missing", "it is not a directory"),
        ("shared/link", "", 409, "missing", "symbolic link"),
    ],
)
async def test_a_directory_that_a_vm_can_not_have_is_refused_with_the_reason(
    served: Api, tmp_path: Path, source: str, mode: str, status: int, code: str, why: str
) -> None:
    got, problem = await create(served, f"{tmp_path}/{source}:/d{mode}")
    assert (got, problem["field"]) == (status, "volumes"), problem
    assert problem["type"].endswith(f":host-directory-{code}")
    assert why in problem["detail"]
    assert status != 403 or f"VOLANT_HOST_DIRS={tmp_path}" in problem["hint"]
