"""Manifests, indexes and configurations: read as Docker reads them, and within bounds, as they are hostile."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, strategies as st

from volant.oci import (
    AMD64,
    ImageConfig,
    ImageHealthCheck,
    Index,
    Manifest,
    OciError,
    Platform,
    Port,
    digest_of,
    parse_config,
    parse_manifest,
)

OCI = "application/vnd.oci.image"
DOCKER = "application/vnd.docker.distribution.manifest"


def descriptor(kind: str, number: int = 0, size: int = 10) -> dict[str, Any]:
    return {"mediaType": kind, "digest": digest_of(bytes([number])), "size": size}


def manifest(layers: int = 1, kind: str = f"{OCI}.layer.v1.tar+gzip", **members: Any) -> dict[str, Any]:
    return {
        "schemaVersion": 2,
        "config": descriptor(f"{OCI}.config.v1+json"),
        "layers": [descriptor(kind, number) for number in range(layers)],
        **members,
    }


def config(layers: int = 1, /, **members: Any) -> dict[str, Any]:
    return {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(bytes([number])) for number in range(layers)]},
        "config": members,
    }


def as_manifest(document: object) -> Manifest:
    found = parse_manifest(json.dumps(document).encode())
    assert isinstance(found, Manifest)
    return found


def as_config(document: dict[str, Any], layers: int = 1) -> ImageConfig:
    return parse_config(json.dumps(document).encode(), as_manifest(manifest(layers)), AMD64)


def entry(platform: dict[str, str] | None, number: int) -> dict[str, Any]:
    return {**descriptor(f"{OCI}.manifest.v1+json", number), **({"platform": platform} if platform else {})}


@pytest.mark.parametrize(
    ("document", "layer"),
    [
        (manifest(), f"{OCI}.layer.v1.tar+gzip"),
        (manifest(mediaType=f"{OCI}.manifest.v1+json", kind=f"{OCI}.layer.v1.tar+zstd"), f"{OCI}.layer.v1.tar+zstd"),
        (
            {
                **manifest(kind="application/vnd.docker.image.rootfs.diff.tar.gzip", mediaType=f"{DOCKER}.v2+json"),
                "config": descriptor("application/vnd.docker.container.image.v1+json"),
            },
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        ),
    ],
)
def test_manifests_of_the_oci_and_of_docker_are_read(document: dict[str, Any], layer: str) -> None:
    found = as_manifest(document)
    assert found.config.digest == digest_of(b"\0")
    assert [each.media_type for each in found.layers] == [layer]


@pytest.mark.parametrize(
    ("document", "code", "says"),
    [
        ([], "image_invalid", "Expected `object`"),
        ({}, "image_unsupported", "schema 0"),
        ({"schemaVersion": 1}, "image_unsupported", "push it again"),
        ({"schemaVersion": 2}, "image_unsupported", "no image"),
        (manifest(mediaType="text/html"), "image_unsupported", "'text/html'"),
        (manifest(artifactType="application/a.chart"), "image_unsupported", "'application/a.chart'"),
        (manifest(config=descriptor("application/a.chart")), "image_unsupported", "'application/a.chart'"),
        (manifest(config=descriptor(f"{OCI}.config.v1+json", size=2**23)), "image_invalid", "8388608 bytes"),
        (manifest(0), "image_unsupported", "no layers"),
        (manifest(128), "image_invalid", "length <= 127"),
        (manifest(kind=f"{OCI}.layer.v1.tar+gzip+encrypted"), "image_unsupported", "encrypted"),
        (manifest(kind=f"{OCI}.layer.nondistributable.v1.tar+gzip"), "image_unsupported", "nondistributable"),
        ({**manifest(), "layers": [{"digest": "md5:x", "size": 1}]}, "image_invalid", "digest"),
        ({**manifest(), "layers": [descriptor("x", size=-1)]}, "image_invalid", "size"),
        ({**manifest(), "layers": [descriptor("x", size=2**50)]}, "image_invalid", "size"),
        ({**manifest(), "layers": [{"digest": digest_of(b"") + "\n", "size": 1}]}, "image_invalid", "digest"),
    ],
)
def test_a_wrong_manifest_is_refused(document: object, code: str, says: str) -> None:
    with pytest.raises(OciError) as caught:
        parse_manifest(json.dumps(document).encode())
    assert caught.value.code == code
    assert says in str(caught.value)


def test_a_document_has_at_most_4_mib() -> None:
    with pytest.raises(OciError, match="more than 4 MiB"):
        parse_manifest(json.dumps(manifest(annotations={"a": "x" * 2**22})).encode())


def test_the_index_entry_of_the_platform_is_chosen() -> None:
    entries = [
        entry(None, 1),
        entry({"os": "unknown", "architecture": "unknown"}, 2),
        entry({"os": "linux", "architecture": "arm64", "variant": "v8"}, 3),
        entry({"os": "linux", "architecture": "amd64", "variant": "v3"}, 4),
        entry({"os": "windows", "architecture": "amd64"}, 5),
        entry({"os": "linux", "architecture": "amd64"}, 6),
        entry({"os": "linux", "architecture": "amd64"}, 7),
    ]
    found = parse_manifest(json.dumps({"schemaVersion": 2, "manifests": entries}).encode())
    assert isinstance(found, Index)
    assert found.choose().digest == digest_of(b"\6")
    assert found.choose(Platform("linux", "arm64", "v8")).digest == digest_of(b"\3")
    with pytest.raises(OciError, match=r"not built for linux/s390x; it is for .*linux/arm64/v8") as caught:
        found.choose(Platform("linux", "s390x"))
    assert caught.value.code == "platform_missing"


def test_a_configuration_is_read_whole() -> None:
    found = as_config(
        config(
            2,
            Entrypoint=["/entry"],
            Cmd=["a", "b c"],
            Env=["PATH=/bin", "EMPTY=", "BARE", "X=1=2", "PATH=/usr/bin"],
            User="app:100",
            WorkingDir="/srv/app",
            ExposedPorts={"80/tcp": {}, "53/UDP": {}, "8000-8002": {}},
            StopSignal="SIGQUIT",
            Labels={"a.b": "c", "empty": None},
            Healthcheck={"Test": ["CMD-SHELL", "curl -f x"], "Interval": 30_000_000_000, "Timeout": 500_000_000,
                         "StartPeriod": 0, "Retries": 3},
            Volumes={"/var/lib/b": {}, "data": {}},
        ),
        layers=2,
    )  # fmt: skip
    assert found == ImageConfig(
        platform=AMD64,
        diff_ids=(digest_of(b"\0"), digest_of(b"\1")),
        entrypoint=("/entry",),
        cmd=("a", "b c"),
        env=(("PATH", "/usr/bin"), ("EMPTY", ""), ("BARE", ""), ("X", "1=2")),
        user="app:100",
        working_dir="/srv/app",
        exposed_ports=(Port(53, "udp"), Port(80), Port(8000), Port(8001), Port(8002)),
        stop_signal="SIGQUIT",
        labels=(("a.b", "c"), ("empty", "")),
        health_check=ImageHealthCheck(command=("curl -f x",), shell=True, interval_s=30, timeout_s=0.5, retries=3),
        volumes=("/data", "/var/lib/b"),
    )


@pytest.mark.parametrize("nothing", [None, {}])
def test_missing_members_null_and_empty_values_are_the_same(nothing: object) -> None:
    empty = as_config({**config(), "config": nothing})
    members = ("Entrypoint", "Cmd", "Env", "User", "WorkingDir", "ExposedPorts", "StopSignal", "Labels", "Volumes")
    assert as_config(config(**dict.fromkeys(members), Healthcheck=None)) == empty
    assert as_config(config(Cmd=[], Env=[], User="", Volumes={}, Healthcheck={"Test": []})) == empty
    assert as_config(config(Healthcheck={"Test": ["NONE"]})) == empty


@pytest.mark.parametrize(
    ("document", "says"),
    [
        (config(2), "names 2 layers, and the manifest 1"),
        ({**config(), "rootfs": {"type": "other", "diff_ids": []}}, "names 0 layers"),
        (config(Env=["=x"]), "without a name"),
        (config(Cmd=["a\0b"]), "zero byte in Cmd"),
        (config(Cmd=["x" * 140_000]), "length <= 131072"),
        (config(Cmd=["x"] * 1025), "length <= 1024"),
        (config(User="a\nb"), "control characters in User"),
        (config(WorkingDir="/a\0"), "control characters in WorkingDir"),
        (config(ExposedPorts={"0/tcp": {}}), "'0/tcp' in ExposedPorts"),
        (config(ExposedPorts={"90-80": {}}), "'90-80' in ExposedPorts"),
        (config(ExposedPorts={"1-65535": {}}), "more than 4096 ports"),
        (config(ExposedPorts={"80/quic": {}}), "'80/quic'"),
        (config(StopSignal="kill -9"), "'kill -9' as StopSignal"),
        (config(Healthcheck={"Test": ["CMD"]}), "'CMD' with 0 arguments"),
        (config(Healthcheck={"Test": ["x"], "Interval": -1}), "Interval"),
        (config(Volumes={str(number): {} for number in range(1025)}), "length <= 1024"),
    ],
)
def test_a_wrong_configuration_is_refused(document: dict[str, Any], says: str) -> None:
    with pytest.raises(OciError) as caught:
        as_config(document)
    assert caught.value.code == "image_invalid"
    assert says in str(caught.value)


def test_an_image_for_another_platform_is_refused() -> None:
    with pytest.raises(OciError, match="for linux/arm64, not for linux/amd64") as caught:
        as_config({**config(), "architecture": "arm64"})
    assert caught.value.code == "platform_missing"


_leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
_values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)
)
_members = st.sampled_from([*manifest(), *config(), "mediaType", "manifests", "Cmd", "Env", "Healthcheck", "Volumes"])


@given(st.dictionaries(_members, _values), st.dictionaries(_members, _values))
def test_a_document_with_anything_in_it_is_read_or_refused(outer: dict[str, Any], inner: dict[str, Any]) -> None:
    for read in (
        lambda: parse_manifest(json.dumps({**manifest(), **outer}).encode()),
        lambda: parse_manifest(json.dumps({"schemaVersion": 2, "manifests": [], **outer}).encode()),
        lambda: as_config({**config(**inner), **outer}),
    ):
        with suppress(OciError):
            read()


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with pytest.raises(OciError):
        parse_manifest(data)


def test_deep_nesting_is_refused() -> None:
    with pytest.raises(OciError):
        parse_manifest(b'{"schemaVersion":2,"manifests":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
