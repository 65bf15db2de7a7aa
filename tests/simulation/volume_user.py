"""A user's volumes in a simulation run, and what must hold of all volumes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from random import Random
from typing import Any

import trio

from tests.names import named
from tests.simulated import Answer, World
from tests.simulated.file_system import File
from tests.simulated.machine import Machine
from tests.simulated.qemu import SimQemu
from volant.hypervisor.qemu._parse_argv import parse_argv
from volant.model import Key, VmRow, Volume
from volant.vm._machine_spec import volume_id_of

VOLUMES = "/api/v1/volumes"
Insist = Callable[..., Awaitable[Answer]]
_JSON = {"content-type": "application/json"}


class VolumeUser:
    """Makes, copies, grows and deletes volumes of its own, and knows what was acknowledged."""

    def __init__(self, rng: Random, owner: str, insist: Insist) -> None:
        self._rng = rng
        self._insist = insist
        self._exists: dict[str, set[bool]] = {f"{owner}-data-{number}": {False} for number in range(2)}
        """Whether each exists: everything that is possible after the acknowledged requests."""
        self._sizes: dict[str, int] = {}
        """The size that each has at least."""
        self._unfinished: set[str] = set()
        """Those of which a resize has failed."""
        self._keys = 0

    def mounts(self) -> list[str]:
        """Returns volumes for a VM."""
        one, other = sorted(self._exists)
        return self._rng.choice([[f"{one}:/d"], [f"{one}:/d:ro"], [f"{other}:/d:nocopy", f"{one}:/d/e:ro"]])

    async def act(self) -> None:
        """Makes one request."""
        name = self._rng.choice(sorted(self._exists))
        await self._rng.choice([self._create, self._create, self._clone, self._resize, self._delete])(name)

    def check(self, volumes: Mapping[Key, Volume]) -> None:
        """Checks at rest that what was acknowledged holds."""
        for name, exists in self._exists.items():
            found = volumes.get(named(name))
            assert (found is not None) in exists, f"volume {name} exists: {found is not None}, expected {exists}"
            if found is not None:
                assert found.size_mb >= self._sizes.get(name, 0), found

    async def complete(self) -> None:
        """Does what answers have asked for: resizes that failed are repeated."""
        for name in sorted(self._unfinished):
            await self._insist("POST", f"{VOLUMES}/{name}/resize", {"size_mb": 256}, _JSON)

    async def _create(self, name: str) -> None:
        await self._make(name, VOLUMES, {"name": name, "size_mb": 64})

    async def _clone(self, name: str) -> None:
        [other] = set(self._exists) - {name}
        await self._make(name, f"{VOLUMES}/{other}/clone", {"name": name})

    async def _make(self, name: str, target: str, body: dict[str, Any]) -> None:
        self._keys += 1
        before = self._exists[name]
        answer = await self._insist("POST", target, body, {**_JSON, "idempotency-key": f"{name}-{self._keys}"})
        if answer.status == 201:
            assert before != {True}, f"volume {name} was made twice"
            self._exists[name] = {True}
            self._sizes.pop(name, None)
        elif answer.status == 503:
            # It may be there, and what was there before may be gone.
            self._exists[name] = {True} if before == {True} else {True, False}
        else:
            # Its name is taken, or that of what to copy is not there, or written to.
            assert answer.status in (404, 409), answer.body
            assert target != VOLUMES or True in before, f"{name} can't be made, and is not there: {answer.body!r}"

    async def _resize(self, name: str) -> None:
        size_mb = self._rng.randrange(64, 256)
        answer = await self._insist("POST", f"{VOLUMES}/{name}/resize", {"size_mb": size_mb}, _JSON)
        if answer.status == 200:
            self._sizes[name] = max(size_mb, self._sizes.get(name, 0))
        elif answer.status == 503:
            self._unfinished.add(name)
        self._exists_if(name, answer, {200})

    async def _delete(self, name: str) -> None:
        before = self._exists[name]
        answer = await self._insist("DELETE", f"{VOLUMES}/{name}")
        if answer.status in (204, 404):
            # With 404 a request without an answer may have deleted it.
            assert answer.status == 404 or True in before, f"volume {name} was deleted, and was not there"
            self._exists[name] = {False}
            self._sizes.pop(name, None)
        elif answer.status == 503:
            self._exists[name] = before | {False}
        else:
            # Whatever was repeated, it is not being deleted.
            assert answer.status == 409, answer.body

    def _exists_if(self, name: str, answer: Answer, statuses: set[int]) -> None:
        exists = self._exists[name]
        if answer.status in statuses:
            assert True in exists, f"volume {name} is there, and should not be: {answer.body!r}"
        elif answer.status == 404:
            assert False in exists, f"volume {name} is gone, and was not deleted"
        else:
            assert answer.status in (409, 503), answer.body


def files(world: World) -> dict[str, File]:
    """Returns the files of volumes, by name."""
    directory, there = world.settings.state_dir / "volumes", world.machine.files
    return {name: there.file(directory / name) for name in there.names(directory)} if there.find(directory) else {}


def check_files(world: World) -> None:
    """Checks that each volume is ready and has its file, and that there is no other file."""
    volumes = world.daemon.store.projection.volumes
    there = files(world)
    assert set(there) == {f"{volume.id}.img" for volume in volumes.values()}, (set(there), volumes)
    for volume in volumes.values():
        file = there[f"{volume.id}.img"]
        assert volume.status == "ready", volume
        assert (bytes(file.data[:4]), file.size) == (b"ext4", volume.size_mb * 2**20), (volume, file.size)


def check_guests(rows: Iterable[VmRow], running: dict[str, SimQemu]) -> None:
    """Checks that each guest that is up has mounted what its row says."""
    for row in rows:
        if row.agent_seen and row.tag in running and row.template is None:
            mounted = [(each["path"], each["read_only"]) for each in running[row.tag].guest.volumes]
            assert mounted == [(mount.path, mount.read_only) for mount in row.volumes], (row.name, mounted)


async def watch_writers(machine: Machine) -> None:
    """Checks whenever a process starts that each volume has one hypervisor that writes, or some that read."""
    while True:
        check_writers(machine.running())
        await machine.changed.wait()


def check_writers(qemus: list[SimQemu]) -> None:
    """Checks the same once."""
    users: dict[str, list[bool]] = {}
    for qemu in qemus:
        parsed = parse_argv(qemu.process.argv)
        for disk in parsed.volumes if parsed is not None else ():
            users.setdefault(volume_id_of(disk.serial), []).append(disk.read_only)
    for volume, readers in users.items():
        assert len(readers) == 1 or all(readers), f"{volume} has a writer and {len(readers) - 1} others"


async def settled(world: World) -> dict[str, Any]:
    """Waits until nothing is half-done, and checks that rows and files fit. Returns the volumes by name."""
    with trio.fail_after(120):
        while any(each.status != "ready" for each in world.daemon.store.projection.volumes.values()):  # noqa: ASYNC110
            await trio.sleep(0.1)
    check_files(world)
    return {each["name"]: each for each in (await world.request("GET", VOLUMES)).json()}
