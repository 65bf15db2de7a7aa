"""Every code block of the pages about actors runs, in order, and prints what the page says."""

from __future__ import annotations

import ast
import io
import re
import sys
import types
from collections.abc import Awaitable, Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import trio

DOCS = Path(__file__).parents[3] / "docs"
PAGES = ["tutorial/actors.md", "explanation/otp-in-trio.md", "explanation/actors.md", "../actors/README.md"]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> Iterator[tuple[int, str, str | None]]:
    """Line, code, and what the next block says that it prints."""
    text = page.read_text()
    found = list(_FENCE.finditer(text))
    for fence, after in zip(found, [*found[1:], None], strict=True):
        if fence[1] == "python":
            printed = after[2] if after is not None and after[1] == "text" else None
            yield text[: fence.start()].count("\n") + 2, fence[2], printed


async def finish(pending: Awaitable[object]) -> None:
    await pending


@pytest.mark.parametrize("name", PAGES)
def test_a_page_runs_and_prints_what_it_says(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    page = DOCS / name
    module = types.ModuleType("page_" + page.stem.replace("-", "_"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(pytest.mark, "_config", None)  # where the plugin is not installed, its marker is unknown
    ran = 0
    for line, code, printed in blocks(page):
        output = io.StringIO()
        with redirect_stdout(output):
            flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
            pending = eval(compile("\n" * (line - 1) + code, str(page), "exec", flags=flags), vars(module))
            if pending is not None:
                trio.run(finish, pending)
        if printed is not None:
            assert output.getvalue() == printed, f"{page}:{line}"
        ran += 1
    assert ran
