"""`volar hosts drain` waits for the moves of a host, also while daemons are restarted."""

from __future__ import annotations

import pytest

from tests.client.kit import Handler, Request, Server, answer, problem, serving
from volant.cli import _hosts
from volant.cli._output import Output
from volant.cli._run import UNREACHABLE, Failure
from volant.cli._streaming import Session
from volant.client import Client

from .kit import volar

HOST = {
    "name": "h2", "state": "up", "draining_since": "2026-01-02T03:04:05Z", "address": "h2.example:7778",
    "version": "0.1.0", "architecture": "x86_64", "accelerator": "kvm", "cpu_cores": 4, "memory_mb": 4096, "zone": "",
    "labels": {}, "vms": 1, "used_cpu_cores": 1, "free_memory_mb": 1024, "free_disk_mb": 1024,
}  # fmt: skip
MOVES = "/api/v1/hosts/h2/moves"
GONE = problem(503, "host-unreachable", "the host 'h2' gives no sign of life")


def moves(*found: dict[str, object], since: str | None = "2026-01-02T03:04:05Z") -> Handler:
    return answer({"host": "h2", "since": since, "moves": found})


def move(state: str, **members: object) -> dict[str, object]:
    return {"vm": "demo", "project": "default", "state": state, "to_host": "h1", "reason": None, **members}


async def breaks_off(request: Request, stream: object) -> None:
    """A daemon that ends while it is asked."""


def drained(server: Server, *answers: Handler) -> None:
    server.routes["POST /api/v1/hosts/h2/drain"] = answer(HOST)
    server.routes[f"GET {MOVES}"] = list(answers)


async def test_a_drain_goes_on_while_daemons_are_restarted() -> None:
    async with serving() as server:
        drained(server, moves(move("copying")), GONE, breaks_off, moves(move("ending")), breaks_off, moves())
        done = await volar(server, "hosts", "drain", "h2")
    assert (done.code, done.out) == (0, b"host h2 is draining, and has no VMs\n"), done.err
    said = done.err.splitlines()
    assert [line for line in said if not line.startswith("no answer")] == [
        "demo: copying to h1", "demo: ending to h1", "demo: has left h2"
    ]  # fmt: skip
    # Once for each time that there is none.
    assert len(said) == 5
    assert said[1] == "no answer about the VMs of h2, whose moves go on: the host 'h2' gives no sign of life"


async def test_a_drain_that_leaves_vms_behind_says_why_and_fails() -> None:
    async with serving() as server:
        drained(server, moves(move("stays", to_host=None, reason="it mounts the volume 'data'")))
        done = await volar(server, "hosts", "drain", "h2")
    assert (done.code, done.out) == (1, b"")
    assert done.err.splitlines()[0] == "demo: stays: it mounts the volume 'data'"
    assert "h2 is draining, and keeps 1 of its VMs" in done.err


async def test_a_drain_ends_with_an_answer_that_is_no_passing_error() -> None:
    async with serving() as server:
        drained(server, moves(move("waiting")), problem(404, "host-not-found", "there is no host named 'h2'"))
        done = await volar(server, "hosts", "drain", "h2")
    assert done.code == 3
    assert "there is no host named 'h2'" in done.err


async def test_a_drain_without_an_answer_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_hosts, "_SILENT_S", 0.2)
    monkeypatch.setattr(_hosts, "_LOOK_S", 0.05)
    async with serving() as server:
        server.routes[f"GET {MOVES}"] = GONE
        async with Client(server.base_url) as client:
            with pytest.raises(Failure, match="no answer about the VMs of h2 for") as failed:
                await _hosts._wait(Session(client, Output(json=False)), "h2", 60)
    assert failed.value.code == UNREACHABLE
    assert failed.value.hint == "the moves go on; run 'volar hosts drain h2' again to see how far they are"
    assert len(server.asked(MOVES)) > 2
