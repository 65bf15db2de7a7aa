"""A fleet of real hosts keeps its promises while its processes die and freeze, its network breaks and its clocks
are set.

`VOLANT_BED_S` is for how long, `VOLANT_BED_SEED` what happens in it.
"""

from __future__ import annotations

import json
import os
import time
from base64 import b64decode
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from random import Random
from typing import Any, Literal

import httpx
import pytest
import trio

from examples.fleet.lab import HostOfLab
from tests.fleet.bed import TTL_S, Bed, Faults, bed
from tests.fleet.clocks import needs_faketime
from tests.fleet.cluster import needs_etcd
from tests.fleet.recorder import Recorder
from tests.system.kit import load

pytestmark = [
    pytest.mark.system,
    pytest.mark.alone,
    needs_etcd,
    needs_faketime,
    pytest.mark.skipif(os.getuid() != 0, reason="makes network namespaces as root"),
]
_ANSWER_S = 20.0
_CALM_S = 120.0
_MOST_VMS = 4
_LIVES_S = 20.0
"""For so long each VM is left alone, so that some get to run."""
_SETTLED_S = 3 * TTL_S
"""After so long without a fault, every host has to know what has happened."""
_HONEST = (409, 429, 500, 502, 503, 504)
"""What a host may say that can't do what it is asked. Never that there is no such VM."""

Known = Literal["asked", "there", "deleting", "gone"]


class Users:
    """Clients of a fleet, which note what they were promised."""

    def __init__(self, bed: Bed, random: Random) -> None:
        self._bed = bed
        self._random = random
        self.vms: dict[str, Known] = {}
        self.promised: set[str] = set()
        """Those that were acknowledged."""
        self._made_at: dict[str, float] = {}
        self.history: dict[str, list[str]] = {}
        """What was asked for each, and answered."""
        self.wrong: list[str] = []
        """Answers that were not true."""
        self.counts: dict[str, int] = {}
        self.furthest_s = 0.0
        """How far the wall clock of a host has been from the true time when it made a VM."""
        self._number = 0

    @property
    def gone(self) -> set[str]:
        return {name for name, known in self.vms.items() if known == "gone"}

    async def keep(self) -> None:
        """Goes on until cancelled."""
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(self._create_and_delete)
            nursery.start_soon(self._use)
            nursery.start_soon(self._drain)

    async def _create_and_delete(self) -> None:
        while True:
            await trio.sleep(self._random.uniform(0.2, 1.5))
            grown = trio.current_time() - _LIVES_S
            old = [name for name, known in self.vms.items() if known == "there" and self._made_at[name] < grown]
            # One that nobody was promised may come late, or never.
            there = [name for name, known in self.vms.items() if known == "asked" or name in self.promised - self.gone]
            if len(there) < _MOST_VMS:
                self._number += 1
                await self._create(f"v{self._number}")
                continue
            # What nobody knows, too: asking again has to be harmless.
            old += [name for name, known in self.vms.items() if known == "deleting"]
            if old:
                await self._delete(self._random.choice(old))

    async def _create(self, name: str) -> None:
        self.vms[name] = "asked"
        answers = []
        body: dict[str, Any] = {"name": name, "memory_mb": 128}
        if self._random.random() < 0.6:
            body["failover"] = "restart"
        # Two hosts are asked at the same time: the name is given once.
        async with trio.open_nursery() as nursery:
            for host in self._random.sample(list(self._bed.hosts), 2):

                async def ask(host: HostOfLab = host) -> None:
                    answer = await self._request(host, "POST", "/api/v1/vms", body)
                    self._remember(name, f"create at {host.name}", answer)
                    answers.append(answer)

                nursery.start_soon(ask)
        made = [answer for answer in answers if answer is not None and answer.status_code == 201]
        self._count("created" if made else "not created")
        if len(made) > 1 and made[0].json()["id"] != made[1].json()["id"]:
            self.wrong.append(f"{name} was created twice: {[answer.text for answer in made]}")
        if made:
            self.promised.add(name)
            at = datetime.fromisoformat(made[0].json()["created_at"])
            self.furthest_s = max(self.furthest_s, abs((datetime.now(UTC) - at).total_seconds()))
        if made and self.vms[name] == "asked":
            self.vms[name] = "there"
            self._made_at[name] = trio.current_time()
        elif not made:
            self.vms[name] = "deleting"

    async def _delete(self, name: str) -> None:
        before, self.vms[name] = self.vms[name], "deleting"
        host = self._random.choice(self._bed.hosts)
        answer = await self._request(host, "DELETE", f"/api/v1/vms/{name}")
        self._remember(name, f"delete at {host.name}", answer)
        if answer is None:
            return
        self._count(f"delete {answer.status_code}")
        if answer.status_code == 204 or (answer.status_code == 404 and name in self.promised and before == "deleting"):
            self.vms[name] = "gone"
        elif answer.status_code == 404 and before == "there":
            self.wrong.append(f"there is a VM {name}, and deleting it says {answer.text}")

    async def _use(self) -> None:
        while True:
            await trio.sleep(self._random.uniform(0.2, 1))
            there = [name for name, known in self.vms.items() if known == "there"]
            if not there:
                continue
            name, host = self._random.choice(there), self._random.choice(self._bed.hosts)
            shown = await self._request(host, "GET", f"/api/v1/vms/{name}")
            if self.vms[name] == "there" and shown is not None:
                self._count(f"get {shown.status_code}")
                if shown.status_code == 200 and shown.json()["name"] != name:
                    self.wrong.append(f"{name} is shown as {shown.text}")
                if shown.status_code not in (200, *_HONEST):
                    self.wrong.append(f"{host.name} shows {name} as {shown.status_code} {shown.text}")
            ran = await self._request(host, "POST", f"/api/v1/vms/{name}/agent/v1/exec", {"command": ["hostname"]})
            if self.vms[name] == "there" and ran is not None:
                self._count(f"exec {ran.status_code}")
                if ran.status_code == 200 and _output(ran) not in (b"", f"{name}\n".encode()):
                    self.wrong.append(f"a command in {name} ran in {_output(ran)!r}")
                if ran.status_code not in (200, *_HONEST):
                    self.wrong.append(f"{host.name} runs a command in {name}: {ran.status_code} {ran.text}")

    async def _drain(self) -> None:
        """As an operator, who drains one host after the other."""
        while True:
            await trio.sleep(self._random.uniform(5, 20))
            host = self._random.choice(self._bed.hosts)
            for what in ("drain", "undrain"):
                asked = self._random.choice(self._bed.hosts)
                while (answer := await self._request(asked, "POST", f"/api/v1/hosts/{host.name}/{what}")) is None or (
                    answer.status_code != 200
                ):
                    self._count(f"{what} {'no answer' if answer is None else answer.status_code}")
                    await trio.sleep(1)
                    asked = self._random.choice(self._bed.hosts)
                self._count(f"{what} 200")
                await trio.sleep(self._random.uniform(5, 30))

    async def _request(self, host: HostOfLab, method: str, path: str, body: Any = None) -> httpx.Response | None:
        """Returns the answer; None: there was none."""
        with trio.move_on_after(_ANSWER_S), suppress(httpx.HTTPError):
            async with httpx.AsyncClient(base_url=host.api, trust_env=False, timeout=None) as http:
                return await http.request(method, path, json=body)
        self._count("no answer")
        return None

    def _remember(self, name: str, what: str, answer: httpx.Response | None) -> None:
        said = "no answer" if answer is None else f"{answer.status_code} {answer.text[:300]}"
        self.history.setdefault(name, []).append(f"{trio.current_time():.1f} {what}: {said}")

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


class Witness:
    """Follows the events of the fleet, at another host after each one that is lost or has been followed for a while."""

    def __init__(self, bed: Bed, random: Random) -> None:
        self._bed = bed
        self._random = random
        self.created: list[str] = []
        self.gaps: list[str] = []
        self.hosts = 0

    async def keep(self) -> None:
        """Goes on until cancelled."""
        cursor = "oldest"
        while True:
            host = self._random.choice(self._bed.hosts)
            with suppress(httpx.HTTPError), trio.move_on_after(self._random.uniform(2, 3 * TTL_S)):
                async with (
                    httpx.AsyncClient(base_url=host.api, trust_env=False, timeout=_ANSWER_S) as http,
                    http.stream("GET", "/api/v1/events/vms", headers={"Last-Event-ID": cursor}) as answer,
                ):
                    self.hosts += answer.status_code == 200
                    fields: dict[str, str] = {}
                    async for line in answer.aiter_lines():
                        name, _, value = line.partition(": ")
                        fields[name] = value
                        if not line:
                            # A block counts as a whole, or comes again.
                            cursor = fields.get("id", cursor)
                            self._note(fields.get("data"))
                            fields = {}
            await trio.sleep(0.2)

    async def has(self, names: set[str]) -> None:
        """Waits for the events of the creation of these VMs."""
        with trio.move_on_after(_CALM_S):
            while not names <= set(self.created):  # noqa: ASYNC110 - of another process
                await trio.sleep(0.2)
        assert names <= set(self.created), f"no event says that these were created: {names - set(self.created)}"
        assert not self.gaps

    def _note(self, data: str | None) -> None:
        event = {} if data is None else json.loads(data)
        if event.get("type") == "STREAM_GAP":
            self.gaps.append(str(data))
        elif event.get("type") == "VM_CREATED":
            self.created.append(event["name"])


# A request that is cut leaves a generator of httpx.
@pytest.mark.full
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_fleet_with_faults_keeps_its_promises(tmp_path: Path) -> None:
    seconds = load("VOLANT_BED_S", usual=20, full=600)
    seed = int(os.environ.get("VOLANT_BED_SEED") or time.time_ns() % 10**6)
    random = Random(seed)
    # Short of time, hosts boot VMs instead of templates.
    templates = "auto" if seconds > 120 else "off"
    async with bed("--templates", templates, random=random, logs=tmp_path) as found, trio.open_nursery() as nursery:
        users, faults, witness = Users(found, random), Faults(found, random), Witness(found, random)
        nursery.start_soon(witness.keep)
        with Recorder(found.lab.directory) as recorder:
            with trio.move_on_after(seconds):
                async with trio.open_nursery() as working:
                    working.start_soon(users.keep)
                    working.start_soon(faults.keep)
            print(f"seed {seed}", *faults.done, faults.kinds, users.counts, sep="\n")
            await settled(found, users)
            assert not recorder.twice()
        assert not users.wrong
        await witness.has(users.promised)
        print(
            f"{len(users.promised)} VMs, {len(recorder.seen)} incarnations, {len(recorder.moved())} moved, "
            f"events from {witness.hosts} streams, a VM made {users.furthest_s:.0f} s from now"
        )
        nursery.cancel_scope.cancel()


_WITHOUT_EPOCHS = "from volant.fleet import Claim; Claim.is_of = lambda self, other: True"


# It checks the test itself.
@pytest.mark.full
@pytest.mark.parametrize("left_out", ["nothing", "watchdog", "epochs"])
async def test_the_recorder_notices_what_is_left_out(left_out: str, tmp_path: Path) -> None:
    """A daemon is stopped for so long that another host takes its VM over, and goes on."""
    random = Random(0)
    flaw = _WITHOUT_EPOCHS if left_out == "epochs" else None
    async with bed("--templates", "off", random=random, logs=tmp_path, hosts=2, members=1, flaw=flaw) as found:
        users = Users(found, random)
        with Recorder(found.lab.directory) as recorder:
            with trio.fail_after(_CALM_S):
                first = await _movable_vm(found, users)
            await _seen(recorder, first.name)
            watchdog = found.processes(first, "_watchdog.py") if left_out == "watchdog" else []
            async with found.frozen(first.pid, *watchdog):
                await _seen(recorder, next(host.name for host in found.hosts if host is not first))
                # For some looks of the recorder, and turns of an idle guest.
                await trio.sleep(3)
            await trio.sleep(_SETTLED_S)
            assert bool(recorder.twice()) is (left_out != "nothing"), recorder.twice()


async def _movable_vm(found: Bed, users: Users) -> HostOfLab:
    """Creates a VM that may be taken over; returns its host."""
    while True:
        made = await users._request(found.hosts[0], "POST", "/api/v1/vms", {"name": "v1", "failover": "restart"})
        assert made is not None
        if made.status_code == 201:
            return next(host for host in found.hosts if host.name == made.headers["Volant-Host"])
        # A host that has just started may not hold VMs back yet.
        assert made.status_code == 503, made.text
        await trio.sleep(0.5)


async def _seen(recorder: Recorder, host: str) -> None:
    """Waits until a VM runs on a host."""
    with trio.move_on_after(_CALM_S):
        while not any(each.host == host for each in recorder.running()):  # noqa: ASYNC110 - of another process
            await trio.sleep(0.2)
        return
    raise AssertionError(f"no VM runs on {host}: { {each: vars(seen) for each, seen in recorder.seen.items()} }")


async def settled(found: Bed, users: Users) -> dict[str, dict[str, Any]]:
    """Waits until all hosts agree on what there is, and returns it. It is what the users were promised."""
    said: Any = None
    lost, back = set[str](), set[str]()
    with trio.move_on_after(_CALM_S):
        while True:
            said = [await _shown(host, users) for host in found.hosts]
            if all(each is not None and each == said[0] for each in said):
                shown = said[0]
                known = users.vms
                lost = {name for name, state in known.items() if state == "there" and name not in shown}
                back = {name for name, state in known.items() if state == "gone" and name in shown}
                if not lost and not back:
                    return dict(shown)
            await trio.sleep(0.5)
    raise AssertionError(
        f"the hosts do not agree, or not on what they promised: {said}; {users.vms}; lost: "
        f"{[users.history[name] for name in lost]}, back: {[users.history[name] for name in back]}"
    )


async def _shown(host: HostOfLab, users: Users) -> dict[str, dict[str, Any]] | None:
    """Returns the VMs that a host finds, with their hosts; None: it does not know now."""
    found = {}
    with suppress(httpx.HTTPError):
        async with httpx.AsyncClient(base_url=host.api, trust_env=False, timeout=_ANSWER_S) as http:
            fleet = (await http.get("/api/v1/fleet")).json()
            if fleet.get("etcd") != "ok" or fleet["unreachable"] or fleet["trouble"] or fleet["conflicts"]:
                return None
            for name in users.vms:
                answer = await http.get(f"/api/v1/vms/{name}")
                if answer.status_code == 200:
                    found[name] = {"id": answer.json()["id"], "host": answer.headers["Volant-Host"]}
                elif answer.status_code != 404:
                    return None
            return found
    return None


def _output(answer: httpx.Response) -> bytes:
    lines = [json.loads(line) for line in answer.text.splitlines()]
    return b"".join(b64decode(line["data"]) for line in lines if line.get("stream") == "stdout" and "data" in line)
