"""The row made from a command line gives the same command line: nothing that a process needs is lost."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from tests.vm.kit import vm_settings
from volant.hypervisor.qemu._argv import build_argv
from volant.hypervisor.qemu._parse_argv import parse_argv
from volant.model import (
    DEFAULT_SUBNET,
    Artifact,
    Boot,
    CreateVm,
    EgressRule,
    Lease,
    Manifest,
    ProcessIdentity,
    Status,
    VmRow,
    Volume,
    VolumeMount,
    allocate,
    new_row,
    user_lease,
)
from volant.vm import VmSettings
from volant.vm._layout import tag_of
from volant.vm._machine_spec import CUSTOM_IMAGE, machine_spec
from volant.vm._orphans import Orphan, adopted_row

NOW = datetime(2026, 1, 2, tzinfo=UTC)
DIGEST = "5" * 64


@pytest.fixture
def settings(tmp_path: Path) -> VmSettings:
    image = tmp_path / "images" / DIGEST
    image.mkdir(parents=True)
    for name in ("vmlinux", "initramfs"):
        (image / name).write_bytes(b"x")
    record = {"min_memory_mb": 96, "kernel_parameters": ["quiet", "random=1"], "protocol": 1, "kernel_version": "6"}
    (image / "image.json").write_text(json.dumps({**record, "kernel": {"size": 1}, "initramfs": {"size": 1}}))
    return vm_settings(tmp_path)


def launched(boot: Boot | None, image: str, cmdline: str, **fields: Any) -> VmRow:
    request = CreateVm(name="demo", cpu_cores=3, memory_mb=160, plugin="site", kernel_cmdline=cmdline)
    row = new_row(request, Manifest(name="site", boot=boot), vm_id=7, now=NOW)
    row = msgspec.structs.replace(row, boots=4, booted=2, generation=2, image=image, **fields)
    return msgspec.structs.replace(row, tag=tag_of("ab12", msgspec.structs.replace(row, boots=3)))


@pytest.mark.parametrize("cmdline", ["", "debug volant.x=1"])
@pytest.mark.parametrize(
    ("boot", "image"),
    [
        (None, DIGEST),
        (Boot(rootfs=Artifact("https://there/root", "1" * 64)), DIGEST),
        (Boot(kernel=Artifact("/srv/k", "2" * 64), initramfs=Artifact("/srv/i", "3" * 64)), CUSTOM_IMAGE),
    ],
)
def test_an_adopted_row_gives_the_same_command_line(
    settings: VmSettings, boot: Boot | None, image: str, cmdline: str
) -> None:
    before = machine_spec(settings, launched(boot, image, cmdline), "tcg")
    found = parse_argv(build_argv(before, (10, 0)))
    assert found is not None
    identity = ProcessIdentity(4242, 99, "boot", before.tag)
    later = NOW + timedelta(days=1)
    row = adopted_row(settings, Orphan(identity, 7, 4, found, None), found, found.name, later)
    assert machine_spec(settings, row, "tcg") == before
    assert (row.kernel_cmdline, row.image, row.boots, row.process) == (cmdline, image, 4, identity)
    assert (row.status, row.created_at) == (Status.RUNNING, later)
    # Its next boot has another tag than any before, and finds its artifacts in the cache.
    assert tag_of("ab12", row).endswith("-7.5")
    adopted = row.manifest.boot or Boot()
    for part in ("kernel", "initramfs", "rootfs"):
        one, other = getattr(boot or Boot(), part), getattr(adopted, part)
        assert (one and one.sha256) == (other and other.sha256)


@pytest.mark.parametrize(
    ("network", "lease", "then"),
    [
        ("none", None, "none"),
        ("bridge", allocate(DEFAULT_SUBNET, (), instance="ab12ab12ab", vm_id=7), "bridge"),
        # That others of the name may reach it, a command line does not say.
        ("blue", allocate(DEFAULT_SUBNET, (), instance="ab12ab12ab", vm_id=7), "bridge"),
        ("user", user_lease("ab12ab12ab", 7), "user"),
    ],
)
@pytest.mark.parametrize("template", [None, "0" * 32])
def test_an_adopted_row_keeps_its_address(
    settings: VmSettings, network: str, lease: Lease | None, then: str, template: str | None
) -> None:
    settings = replace(settings, nameservers=("10.0.0.53",))
    before = machine_spec(settings, launched(None, DIGEST, "", network=network, lease=lease, template=template), "tcg")
    found = parse_argv(build_argv(before, (10, 0)))
    assert found is not None
    identity = ProcessIdentity(4242, 99, "boot", before.tag)
    row = adopted_row(settings, Orphan(identity, 7, 4, found, None), found, found.name or "demo", NOW)
    assert (row.network, row.lease) == (then, lease)
    assert machine_spec(settings, row, "tcg").nic == before.nic


@pytest.mark.parametrize(
    "lease", [allocate(DEFAULT_SUBNET, (), instance="ab12ab12ab", vm_id=7), user_lease("ab12ab12ab", 7)]
)
def test_an_orphan_whose_egress_rules_are_lost_may_connect_to_nothing(settings: VmSettings, lease: Lease) -> None:
    settings = replace(settings, nameservers=("10.0.0.53",))
    network = "bridge" if lease.tap else "user"
    for egress, then in (((EgressRule(name="a.example"),), "none"), ("none", "none"), ("all", "all")):
        row = launched(None, DIGEST, "", network=network, lease=lease, egress=egress)
        before = machine_spec(settings, row, "tcg")
        found = parse_argv(build_argv(before, (10, 0)))
        assert found is not None
        identity = ProcessIdentity(4242, 99, "boot", before.tag)
        adopted = adopted_row(settings, Orphan(identity, 7, 4, found, None), found, found.name or "demo", NOW)
        assert adopted.egress == then
        assert machine_spec(settings, adopted, "tcg").nic == before.nic


def test_an_adopted_row_has_the_volumes_of_its_process(settings: VmSettings) -> None:
    volumes = {
        letter * 16: Volume(id=letter * 16, name=f"v{letter}", size_mb=64, created_at=NOW, writers=3) for letter in "ab"
    }
    mounts = (
        VolumeMount(name="va", id="a" * 16, path="/d"),
        VolumeMount(name="vb", id="b" * 16, path="/d/x", read_only=True),
    )
    before = machine_spec(settings, launched(None, DIGEST, "", volumes=mounts), "tcg")
    found = parse_argv(build_argv(before, (10, 0)))
    assert found is not None
    identity = ProcessIdentity(4242, 99, "boot", before.tag)
    row = adopted_row(settings, Orphan(identity, 7, 4, found, None), found, found.name, NOW, volumes)
    assert machine_spec(settings, row, "tcg") == before
    # A command line does not say where they are mounted.
    assert [str(mount) for mount in row.volumes] == ["va:/volumes/va", "vb:/volumes/vb:ro"]
