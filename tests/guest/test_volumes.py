"""What the agent refuses to mount, before it touches anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from volant.guest import _copy_up, _rootfs, _volumes
from volant.guest._http import Problem, Request
from volant.guest._stream import Stream

from .conftest import needs_chroot

GOOD: dict[str, object] = {"serial": "vol-0123456789abcdef", "path": "/data", "read_only": True}


class Sent:
    """A stream with a request's body."""

    def __init__(self, body: object) -> None:
        self._body = json.dumps(body).encode()
        self.status = 0

    def read_body(self, _: Any) -> bytes:
        return self._body

    def answer(self, status: int, _: bytes) -> None:
        self.status = status


def put(body: object) -> int:
    sent = Sent(body)
    _volumes.serve_put(cast(Stream, sent), cast(Request, None))
    return sent.status


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "volumes"),
        ({"volumes": {}}, "volumes"),
        ({"volumes": [GOOD] * 65}, "volumes"),
        ({"volumes": ["data"]}, "volumes[0]"),
        ({"volumes": [GOOD, {**GOOD, "serial": ""}]}, "volumes[1].serial"),
        ({"volumes": [{**GOOD, "serial": "x" * 21}]}, "volumes[0].serial"),
        ({"volumes": [{"tag": "directory0" * 4, "path": "/data"}]}, "volumes[0].tag"),
        ({"volumes": [{"path": "/data"}]}, "volumes[0].serial"),
        ({"volumes": [{**GOOD, "path": "data"}]}, "volumes[0].path"),
        ({"volumes": [{**GOOD, "read_only": 1}]}, "volumes[0].read_only"),
        ({"volumes": [{**GOOD, "bytes": -1}]}, "volumes[0].bytes"),
        ({"volumes": [{**GOOD, "options": "suid"}]}, "volumes[0].options"),
    ],
)
def test_a_malformed_request_is_refused(body: object, field: str) -> None:
    with pytest.raises(Problem) as problem:
        put(body)
    assert (problem.value.status, problem.value.field) == (400, field)


def test_a_disk_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rootfs, "_DISK_S", 0.0)
    with pytest.raises(Problem) as problem:
        put({"volumes": [GOOD]})
    assert (problem.value.status, str(GOOD["serial"]) in problem.value.detail) == (409, True)
    assert problem.value.detail.startswith("/data: ")


@needs_chroot
def test_a_reader_is_refused_a_volume_whose_copy_was_cut_off(mounted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (mounted / "data").mkdir()
    (mounted / "data" / _copy_up.MARKER).touch()
    monkeypatch.setattr(_rootfs, "find_disk", lambda serial: "/dev/null")
    monkeypatch.setattr(_rootfs, "holds_ext4", lambda device: True)
    monkeypatch.setattr(_volumes, "_run", lambda command, target: 0)
    with pytest.raises(Problem) as problem:
        put({"volumes": [GOOD]})
    assert (problem.value.status, "start a VM that writes to the volume" in problem.value.detail) == (409, True)


def test_no_volumes_are_no_error() -> None:
    assert put({"volumes": []}) == 200


@needs_chroot
def test_links_in_the_root_do_not_lead_out_of_it(mounted: Path) -> None:
    """Where a volume is mounted, and what is made for it."""
    (mounted / "app").symlink_to("../outside")
    (mounted / "outside").mkdir()
    with _volumes._directory("/app/data") as there:
        assert Path(f"/proc/self/fd/{there}").readlink() == mounted / "outside/data"
    assert not (mounted.parent / "outside").exists()
