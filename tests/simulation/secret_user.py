"""A user's secrets in a simulation run, and what must hold of all of them."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from pathlib import Path
from random import Random
from typing import Any

from actors.testing import allow_real
from tests.names import named
from tests.simulated import World
from tests.simulated.file_system import File
from tests.simulated.qemu import SimQemu
from tests.simulation.volume_user import Insist
from volant.model import Key, Secret, Status, VmRow

SECRETS = "/api/v1/secrets"
MARK = "staple-"
"""What each value begins with, and nothing else has in it."""
_ENCODED = base64.b64encode(MARK.encode()).rstrip(b"=")[:-1]
_JSON = {"content-type": "application/json"}


class SecretUser:
    """Sets and deletes secrets of its own, and knows what was acknowledged."""

    def __init__(self, rng: Random, owner: str, insist: Insist) -> None:
        self._rng = rng
        self._insist = insist
        self._exists: dict[str, set[bool]] = {f"{owner}-token-{number}": {False} for number in range(2)}
        """Whether each exists: everything that is possible after the acknowledged requests."""
        self._count = 0

    async def members(self) -> dict[str, Any]:
        """Returns members of a request for a VM. What they name exists, unless it is not known."""
        one, other = sorted(self._exists)
        for name in (one, other):
            if True not in self._exists[name]:
                await self._set(name)
        return self._rng.choice(
            [{"env": {"T": {"secret": one}}}, {"secrets": [one]}, {"env": {"T": {"secret": other}}, "secrets": [one]}]
        )

    async def act(self) -> None:
        """Makes one request."""
        name = self._rng.choice(sorted(self._exists))
        await self._rng.choice([self._set, self._set, self._set, self._delete])(name)

    def check(self, secrets: Mapping[Key, Secret]) -> None:
        """Checks at rest that what was acknowledged holds."""
        for name, exists in self._exists.items():
            found = secrets.get(named(name))
            assert (found is not None) in exists, f"secret {name} exists: {found is not None}, expected {exists}"

    async def _set(self, name: str) -> None:
        self._count += 1
        body = {"value": f"{MARK}{name}-{self._count}"}
        answer = await self._insist("PUT", f"{SECRETS}/{name}", body, _JSON)
        if answer.status == 200:
            self._exists[name] = {True}
        else:
            assert answer.status == 503, answer.body
            self._exists[name] = self._exists[name] | {True}
        assert MARK.encode() not in answer.body

    async def _delete(self, name: str) -> None:
        answer = await self._insist("DELETE", f"{SECRETS}/{name}")
        if answer.status == 503:
            self._exists[name] = self._exists[name] | {False} if True in self._exists[name] else {False}
        elif answer.status == 409:
            assert True in self._exists[name], answer.body
            self._exists[name] = {True}
        else:
            # One without an answer may have been done before.
            assert answer.status in (204, 404), answer.body
            self._exists[name] = {False}


def check_values(rows: Iterable[VmRow], running: Mapping[str, SimQemu]) -> int:
    """Checks that each guest that runs has values of its VM's secrets and no others. Returns how many have some."""
    count = 0
    for row in rows:
        if row.status is not Status.RUNNING:
            continue
        sent = running[row.tag].guest.secrets
        if not row.secret_env and not row.secrets:
            assert not sent, (row.name, sent)
            continue
        count += 1
        assert sent["boot"].endswith(f".{row.boot_key}"), (row.boot_key, sent)
        wanted = {**row.secret_env, **{file.path: file.name for file in row.secrets}}
        got = {**sent["env"], **{file["path"]: file["data"] for file in sent["files"]}}
        assert got.keys() == wanted.keys(), (row.name, got)
        for where, data in got.items():
            assert base64.b64decode(data).decode().startswith(f"{MARK}{wanted[where]}-"), (row.name, where, data)
    return count


def check_nowhere(world: World) -> None:
    """Checks that no value is in plain text in the files of the machine, or in the database."""
    files = world.machine.files
    for path in files.below(Path("/")):
        node = files.find(path)
        is_copy = path.name == "saved.state" or path.parent.name.startswith(("fork-", "snapshot-"))
        assert not isinstance(node, File) or is_copy or not _has_value(bytes(node.data)), path
    with allow_real("files"):
        databases = [path.read_bytes() for path in world.settings.state_dir.glob("*.db*")]
    assert databases
    assert not any(map(_has_value, databases)), "a value is in the database"


def _has_value(data: bytes) -> bool:
    return MARK.encode() in data or _ENCODED in data
