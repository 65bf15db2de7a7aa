"""A VM boots from its plugin's artifacts, else the operator's files, else the built image; each part on its own."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tests.vm.kit import vm_settings
from volant.hypervisor import Disk
from volant.images import artifact_path
from volant.model import Artifact, Boot, CreateVm, Manifest, VmRow, new_row
from volant.vm import VmSettings
from volant.vm._machine_spec import machine_spec, uses_image

NOW = datetime(2026, 1, 2, tzinfo=UTC)
CACHE = Path("/cache")
SETTINGS = vm_settings(CACHE)
OPERATOR = {"kernel": Path("/operator/kernel"), "initramfs": Path("/operator/initramfs")}
PARTS = ("kernel", "initramfs")


def artifact(digit: str) -> Artifact:
    return Artifact(f"/srv/{digit}", digit * 64)


def row(boot: Boot | None, *, vm_id: int = 7, now: datetime = NOW) -> VmRow:
    request = CreateVm(name="demo", cpu_cores=1, memory_mb=128, plugin="site")
    return new_row(request, Manifest(name="site", boot=boot), vm_id=vm_id, now=now)


def settings(*operator: str) -> VmSettings:
    return replace(
        SETTINGS,
        kernel=OPERATOR["kernel"] if "kernel" in operator else None,
        initramfs=OPERATOR["initramfs"] if "initramfs" in operator else None,
    )


@pytest.mark.parametrize("plugin", [(), ("kernel",), ("initramfs",), PARTS])
@pytest.mark.parametrize("operator", [(), ("kernel",), ("initramfs",), PARTS])
def test_the_plugin_wins_over_the_operator_and_both_over_the_built_image(
    plugin: tuple[str, ...], operator: tuple[str, ...]
) -> None:
    parts = {part: artifact(str(at)) for at, part in enumerate(PARTS) if part in plugin}
    boot = msgspec.structs.replace(Boot(), **parts)
    spec = machine_spec(settings(*operator), row(boot), "tcg")
    for at, part in enumerate(PARTS):
        found = getattr(spec, part)
        if part in plugin:
            assert found == artifact_path(CACHE, str(at) * 64)
        elif part in operator:
            assert found == OPERATOR[part]
        else:
            assert found.name.endswith("-is-gone")
    assert uses_image(settings(*operator), row(boot).manifest) is (set(PARTS) - {*plugin, *operator} != set())


def test_a_root_filesystem_gives_a_layer_of_its_own() -> None:
    one = row(Boot(rootfs=artifact("a")))
    spec = machine_spec(SETTINGS, one, "kvm")
    assert spec.root == Disk(artifact_path(CACHE, "a" * 64), SETTINGS.disk_dir / one.layer / "root.qcow2")
    assert one.view.disk == "overlay"
    assert uses_image(SETTINGS, one.manifest)
    # Neither another VM nor one with the same id in another database has it.
    others = [
        row(Boot(rootfs=artifact("a")), vm_id=8),
        row(Boot(rootfs=artifact("a")), now=NOW + timedelta(milliseconds=1)),
    ]
    assert len({vm.layer for vm in (one, *others)}) == 3


def test_without_one_there_is_no_disk() -> None:
    for boot in (None, Boot(kernel=artifact("a"))):
        without = row(boot)
        assert machine_spec(SETTINGS, without, "tcg").root is None
        assert (without.layer, without.view.disk) == ("", "none")


def test_a_row_of_an_older_daemon_has_no_layer() -> None:
    older = msgspec.to_builtins(row(None))
    del older["layer"]
    assert msgspec.convert(older, VmRow).layer == ""
