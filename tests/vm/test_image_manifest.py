"""A VM of an OCI image runs what a container of it would run, as far as the request does not say otherwise."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from volant.model import CreateVm, ExecDefaults, HealthCheck, Manifest, Problem, Workload, new_row
from volant.oci import AMD64, ImageConfig, ImageHealthCheck, Port, Resolved
from volant.vm._image_manifest import image_manifest, with_exposed_ports

DIGEST = "sha256:" + "a" * 64
CONFIG: dict[str, Any] = {
    "platform": AMD64,
    "diff_ids": (DIGEST,),
    "entrypoint": ("/entry",),
    "cmd": ("serve", "--all"),
    "env": (("PATH", "/app/bin:/bin"), ("MODE", "image")),
    "user": "app:www",
    "working_dir": "/app",
    "stop_signal": "SIGQUIT",
    "labels": (("version", "1"),),
}


def made(config: dict[str, Any] | None = None, **request: Any) -> Manifest:
    image = Resolved(reference="app:1", digest=DIGEST, config=ImageConfig(**{**CONFIG, **(config or {})}))
    return image_manifest(CreateVm(name="demo", image="app:1", **request), image)


def workload(config: dict[str, Any] | None = None, **request: Any) -> Workload:
    found = made(config, **request).workload
    assert found is not None
    return found


def test_the_image_says_what_runs_and_how() -> None:
    manifest = made()
    assert manifest.boot is not None
    assert manifest.boot.image is not None
    assert (manifest.boot.image.reference, manifest.boot.image.digest) == ("app:1", DIGEST)
    found = workload()
    assert found.entrypoint == ("/entry", "serve", "--all")
    assert found.env == {"PATH": "/app/bin:/bin", "MODE": "image"}
    assert (found.user, found.workdir, found.stop_signal) == ("app:www", "/app", "SIGQUIT")
    assert (found.restart, found.on_exit, found.health_check) == ("never", "stop", None)
    assert manifest.exec == ExecDefaults(env=found.env, user="app:www", workdir="/app")
    assert manifest.labels == {"version": "1"}
    assert manifest.directories == ()


def test_paths_of_volumes_are_directories_of_the_vm() -> None:
    assert made({"volumes": ("/data", "/var/lib/app")}).directories == ("/data", "/var/lib/app")


@pytest.mark.parametrize(
    ("request_", "program"),
    [
        ({"command": ["x"]}, ("/entry", "x")),
        ({"command": []}, ("/entry",)),
        ({"entrypoint": ["sh", "-c"]}, ("sh", "-c")),
        ({"entrypoint": ["sh", "-c"], "command": ["x"]}, ("sh", "-c", "x")),
        ({"entrypoint": [], "command": ["x", "y"]}, ("x", "y")),
    ],
)
def test_a_request_replaces_the_command_and_an_entrypoint_drops_it(
    request_: dict[str, Any], program: tuple[str, ...]
) -> None:
    assert workload(None, **request_).entrypoint == program


def test_a_request_replaces_user_directory_and_signal() -> None:
    found = workload(None, user="0", workdir="/", stop_signal="9")
    assert (found.user, found.workdir, found.stop_signal) == ("0", "/", "9")


def test_an_image_without_a_program_needs_one_unless_nothing_is_started() -> None:
    nothing = {"entrypoint": (), "cmd": ()}
    with pytest.raises(Problem, match="names no program") as refused:
        made(nothing)
    assert (refused.value.status, refused.value.field) == (400, "command")
    assert made(nothing, start_workload=False).workload is None


def test_a_plugin_with_an_image_has_a_disk_of_a_size_too() -> None:
    manifest = msgspec.structs.replace(made(), name="site")
    row = new_row(CreateVm(name="demo", plugin="site"), manifest, vm_id=1, now=datetime(2026, 1, 1, tzinfo=UTC))
    assert (row.layer != "", row.disk_mb) == (True, 10240)


def test_an_empty_configuration_means_root_in_the_root_directory() -> None:
    found = workload({"user": "", "working_dir": "", "stop_signal": "", "env": ()})
    assert (found.user, found.workdir, found.stop_signal, found.env) == (None, "/", "SIGTERM", {})


def test_health_checks_have_dockers_defaults_and_the_limits_of_ours() -> None:
    check = ImageHealthCheck(command=("curl -f localhost",), shell=True, interval_s=10_000, start_period_s=60)
    assert workload({"health_check": check}).health_check == HealthCheck(
        command=("/bin/sh", "-c", "curl -f localhost"), interval_s=3600, timeout_s=30, retries=3, start_period_s=60
    )
    assert workload({"health_check": check}, health_check="none").health_check is None
    own = HealthCheck(command=("true",))
    assert workload({"health_check": check}, health_check=own).health_check == own


def test_exposed_ports_get_free_ports_of_the_host() -> None:
    ports = (Port(53, "udp"), Port(80), Port(443), Port(9999, "sctp"))
    image = Resolved(reference="app:1", digest=DIGEST, config=ImageConfig(**{**CONFIG, "exposed_ports": ports}))
    request = CreateVm(name="demo", image="app:1", ports=("8080:80",))
    assert with_exposed_ports(request, image, {49153}, start=0).ports == ("8080:80", "49152:53/udp", "49154:443/tcp")
    with pytest.raises(Problem, match="no port of the host is free"):
        with_exposed_ports(request, image, range(49152, 65536), start=5)


def test_labels_that_a_vm_can_not_have_are_left_out() -> None:
    labels = (("good", "1"), ("a=b", "1"), ("long", "x" * 2000), ("line", "a\nb"), ("", "1"))
    assert made({"labels": labels}).labels == {"good": "1"}


def test_what_is_no_manifest_names_the_image() -> None:
    with pytest.raises(Problem, match=r"the image app:1: .*257 items") as refused:
        made({"cmd": ("x",) * 256})
    assert (refused.value.status, refused.value.field) == (400, "image")
