"""The runtime imports Trio and the standard library alone, and no module that Trio has not imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, sys
{}
print(json.dumps(sorted(sys.modules)))
"""


def modules(statement: str) -> set[str]:
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(statement)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(json.loads(ran.stdout))


def test_the_runtime_imports_nothing_else() -> None:
    brought_in = modules("import trio, actors") - modules("import trio")
    foreign = {name for name in brought_in if name.partition(".")[0] not in sys.stdlib_module_names}
    assert {name for name in foreign if not name.startswith("actors")} == set()
    assert not any(name.startswith("actors.testing") for name in brought_in)
    assert brought_in - foreign <= {"dataclasses"}, "everything else that it uses, Trio has imported already"
