"""A manifest is accepted completely, or refused with the name of the wrong field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from openapi_schema_validator import OAS31Validator

from volant.api._openapi import document
from volant.http import decode
from volant.model import BASE, Manifest, Problem, check_manifest

WORKLOAD: dict[str, Any] = {"entrypoint": ["serve"], "port": 8080}
DIGEST = "0" * 64


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth - 1):
        value = {"a": value}
    return value


def take(**members: Any) -> Manifest:
    return check_manifest(decode(msgspec.json.encode({"name": "web", **members}), Manifest))


def by_schema(**members: Any) -> bool:
    root = document()
    schema = {**root["components"]["schemas"]["Manifest"], "components": root["components"]}
    return bool(OAS31Validator(schema).is_valid({"name": "web", **members}))


GOOD: list[dict[str, Any]] = [
    {},
    {"workload": {"entrypoint": ["serve"]}},
    {"workload": WORKLOAD, "actions": {"shot": {"path": "/v1/shot"}, "a": {"path": "/", "method": "GET"}}},
    {"workload": WORKLOAD, "actions": {"shot": {"path": "/a%20b/~c/...", "input": nested(64), "timeout_s": 600}}},
    {"workload": WORKLOAD, "openapi": "/openapi.json"},
    {"openapi": {"openapi": "3.1.0", "info": {}, "paths": {}}},
    {"workload": {**WORKLOAD, "health_check": {"path": "/healthz?full=1"}}},
    {"workload": {"entrypoint": ["x"], "health_check": {"command": ["true"]}}},
    {"workload": {"entrypoint": ["x"], "user": "web:adm", "stop_signal": "SIGRTMIN+3", "on_exit": "stop"}},
    {"workload": {"entrypoint": ["x"], "user": "1000", "stop_signal": "3"}},
    {"exec": {"env": {"A": "b"}, "user": "1000:1000", "workdir": "/srv"}},
    {"exec": {}},
    {"boot": {"rootfs": {"url": "/srv/my images/x.ext4", "sha256": DIGEST}}},
    {"boot": {"rootfs": {"url": "file:///srv/x.ext4", "sha256": DIGEST}}},
    {"boot": {"kernel": {"url": "https://images.example:8443/vmlinux?v=2", "sha256": DIGEST}}},
    {"boot": {"initramfs": {"url": "http://[::1]/x", "sha256": DIGEST}}},
    {"labels": {"team": "web"}, "version": "1.2.3", "runtime": "base", "resources": {"memory_mb": 256}},
]


@pytest.mark.parametrize("members", GOOD, ids=str)
def test_good_manifests_pass_the_code_and_the_schema(members: dict[str, Any]) -> None:
    take(**members)
    assert by_schema(**members)


def action(**members: Any) -> dict[str, Any]:
    return {"workload": WORKLOAD, "actions": {"shot": {"path": "/shot", **members}}}


def rootfs(url: str) -> dict[str, Any]:
    return {"boot": {"rootfs": {"url": url, "sha256": DIGEST}}}


def workload(**members: Any) -> dict[str, Any]:
    return {"workload": {**WORKLOAD, **members}}


BAD_PATHS = [
    "shot",
    "/a b",
    "/a\r\nX: y",
    "/ä",
    "/a?b=c",
    "/a#b",
    "/a\\b",
    "/a%2",
    "/a/../b",
    "/a/%2e%2E",
    "/.",
    "/a%2F..",
    "/" + "a" * 1024,
]

BAD: list[tuple[str, dict[str, Any]]] = [
    ("name", {"name": "Web"}),
    ("surplus", {"surplus": 1}),
    ("runtime", {"runtime": "no name"}),
    ("version", {"version": "1\n2"}),
    ("version", {"version": "1" * 65}),
    ("description", {"description": "a\x1b[2J"}),
    ("schema_version", {"schema_version": "2"}),
    ("resources.memory_mb", {"resources": {"memory_mb": 63}}),
    ("resources.memory_mb", {"resources": {"memory_mb": 10**30}}),
    ("labels", {"labels": {f"l{i}": "" for i in range(65)}}),
    ("labels", {"labels": {"a=b": "c"}}),
    ("workload.entrypoint", workload(entrypoint=[])),
    ("workload.entrypoint", workload(entrypoint=[""])),
    ("workload.entrypoint", workload(entrypoint=["a\0b"])),
    ("workload.port", workload(port=0)),
    ("workload.port", workload(port=65536)),
    ("workload.workdir", workload(workdir="home")),
    *(("workload.user", workload(user=user)) for user in ("", ":adm", "a\0b", "a" * 257)),
    *(("workload.stop_signal", workload(stop_signal=text)) for text in ("", "SIG NONE", "9" * 20)),
    ("workload.on_exit", workload(on_exit="restart")),
    ("exec.user", {"exec": {"user": ""}}),
    ("exec.workdir", {"exec": {"workdir": "srv"}}),
    ("exec.env", {"exec": {"env": {"A=B": "c"}}}),
    ("exec.command", {"exec": {"command": ["sh"]}}),
    ("workload.env", workload(env={"A=B": "c"})),
    ("workload.env", workload(env={f"V{i}": "" for i in range(257)})),
    ("workload.env.A", workload(env={"A": "x" * 32769})),
    ("workload.health_check", workload(health_check={})),
    ("workload.health_check", workload(health_check={"path": "/", "command": ["true"]})),
    ("workload.health_check.path", workload(health_check={"path": "x"})),
    ("workload.health_check.path", workload(health_check={"path": "/a b"})),
    ("workload.health_check.path", workload(health_check={"path": "/\r\nX: y"})),
    ("workload.health_check.port", {"workload": {"entrypoint": ["x"], "health_check": {"path": "/"}}}),
    ("actions", {"workload": WORKLOAD, "actions": {"No": {"path": "/"}}}),
    ("actions", {"workload": WORKLOAD, "actions": {f"a{i}": {"path": "/"} for i in range(129)}}),
    ("workload", {"actions": {"shot": {"path": "/"}}}),
    ("workload.port", {"workload": {"entrypoint": ["x"]}, "actions": {"shot": {"path": "/"}}}),
    ("workload.port", {"workload": {"entrypoint": ["x"]}, "openapi": "/openapi.json"}),
    *(("actions.shot.path", action(path=path)) for path in BAD_PATHS),
    ("actions.shot.method", action(method="HEAD")),
    ("actions.shot.timeout_s", action(timeout_s=0)),
    ("actions.shot.timeout_s", action(timeout_s=601)),
    ("actions.shot.description", action(description="\x07")),
    ("actions.shot.input", action(input=nested(65))),
    ("actions.shot.output", action(output={"a": [nested(64)]})),
    ("actions.shot.surplus", action(surplus=1)),
    ("openapi", {"workload": WORKLOAD, "openapi": "openapi.json"}),
    ("openapi", {"workload": WORKLOAD, "openapi": "/../x"}),
    ("openapi", {"openapi": 3}),
    ("openapi.openapi", {"openapi": {"swagger": "2.0"}}),
    ("openapi.openapi", {"openapi": {"openapi": 3}}),
    ("openapi", {"openapi": {"openapi": "3.1.0", "paths": nested(64)}}),
    ("openapi", {"openapi": {"openapi": "3.1.0", "info": "x" * 262144}}),
    ("boot.rootfs.sha256", {"boot": {"rootfs": {"url": "/x", "sha256": DIGEST + "\n"}}}),
    ("boot.rootfs.url", rootfs("images/x.ext4")),
    ("boot.rootfs.url", rootfs("ftp://host/x")),
    ("boot.rootfs.url", rootfs("file://elsewhere/x")),
    ("boot.rootfs.url", rootfs("file:x")),
    ("boot.rootfs.url", rootfs("https://")),
    ("boot.rootfs.url", rootfs("https://host:port/x")),
    ("boot.rootfs.url", rootfs("https://[::1/x")),
    ("boot.rootfs.url", rootfs("https://user:secret@host/x")),
    ("boot.rootfs.url", rootfs("https://host/a b")),
    ("boot.rootfs.url", rootfs("https://host/x#y")),
    ("boot.rootfs.url", rootfs("/a\0b")),
    ("boot.rootfs.sha256", {"boot": {"rootfs": {"url": "/x", "sha256": "F" * 64}}}),
]


@pytest.mark.parametrize(("field", "members"), BAD, ids=lambda value: str(value)[:60])
def test_bad_manifests_are_refused_with_the_field(field: str, members: dict[str, Any]) -> None:
    with pytest.raises(Problem) as caught:
        take(**members)
    assert (caught.value.status, caught.value.field) == (400, field)
    assert len(caught.value.detail) < 500


@pytest.mark.parametrize(
    ("field", "members"),
    [
        (field, members)
        for field, members in BAD
        if "%2F.." not in str(members)
        and field != "workload.health_check.port"
        and not field.startswith(("actions.shot.input", "actions.shot.output", "openapi"))
        and not field.startswith(("labels", "boot.rootfs.url"))
    ],
    ids=lambda value: str(value)[:60],
)
def test_the_schema_refuses_what_the_code_refuses(field: str, members: dict[str, Any]) -> None:
    assert not by_schema(**members)


@pytest.mark.parametrize("text", ["0", "65", "SIGNONE", "SIGRTMIN+99", "SIGRTMAX+1", "RTMIN-1", "RTMIN+", "+3", "SIG"])
def test_a_stop_signal_has_to_exist(text: str) -> None:
    with pytest.raises(Problem) as caught:
        take(**workload(stop_signal=text))
    assert caught.value.field == "workload.stop_signal"


def test_an_error_does_not_repeat_the_user_in_a_url() -> None:
    with pytest.raises(Problem) as caught:
        take(**rootfs("https://user:secret@host/x"))
    assert "secret" not in caught.value.detail


def test_the_built_in_manifest_is_good() -> None:
    check_manifest(BASE)


def test_the_published_schema_accepts_and_refuses_by_itself() -> None:
    kept = json.loads((Path(__file__).resolve().parents[2] / "docs/reference/manifest.schema.json").read_text())
    Draft202012Validator.check_schema(kept)
    for members in GOOD:
        assert Draft202012Validator(kept).is_valid({"name": "web", **members})
    assert not Draft202012Validator(kept).is_valid({"name": "web", "actions": {"shot": {"path": "/shot"}}})
