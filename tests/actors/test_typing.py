"""The type checker knows the reply of a request, and finds a handler that returns something else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
from dataclasses import dataclass
from functools import partial

from actors import Actor, Child, Deferred, DynamicSupervisor, Ref, Request, Started, Supervisor, handles


@dataclass(frozen=True)
class Get(Request[int]):
    pass


@dataclass(frozen=True)
class Note:
    text: str


class Good(Actor):
    def __init__(self, n: int) -> None:
        self.n = n

    @handles(Get)
    async def get(self, message: Get) -> int | Deferred[int]:
        reveal_type(self.ctx.defer(message))  # R: Deferred[int]
        return 1

    @handles(Note)
    async def note(self, message: Note) -> None: ...


class Bad(Actor):
    @handles(Get)  # E: [arg-type]
    async def get(self, message: Get) -> str:
        return ""

    @handles(Note)  # E: [arg-type]
    async def note(self, message: Get) -> None: ...


async def api(port: int, *, task_status: Started) -> None: ...


async def main(vms: DynamicSupervisor) -> None:
    child = Child("good", partial(Good, 3))
    reveal_type(child.ref)  # R: Ref[Good]
    ref = await vms.start_child(child)
    reveal_type(ref)  # R: Ref[Good]
    reveal_type(await ref.ask(Get(), timeout_s=1))  # R: int
    Supervisor(children=[child, Child("api", partial(api, 1)), Child("vms", vms)])
    any_actor: Ref[Actor] = ref
    await ref.ask(Note(""), timeout_s=1)  # E: [arg-type]
    Child("wrong", dict)  # E: [type-var]
"""


def test_mypy_knows_replies_and_finds_wrong_handlers(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    root = Path(__file__).parents[2]
    ran = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", root / ".mypy_cache", program],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    found = {
        int(line.split(":")[1]): line for line in ran.stdout.splitlines() if ": error:" in line or "Revealed" in line
    }
    expected = {n: line for n, line in enumerate(PROGRAM.splitlines(), 1) if "# E: " in line or "# R: " in line}
    assert sorted(found) == sorted(expected), ran.stdout
    for number, line in expected.items():
        kind, text = line.split("# ")[1].split(": ", 1)
        said = found[number].replace("actors._mailbox.", "").replace("actors._ref.", "").replace("program.", "")
        assert text in said.replace("builtins.", ""), said
        assert (kind == "E") == (": error:" in said)
