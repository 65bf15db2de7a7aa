"""The links of the documentation lead somewhere, and the names on its pages exist."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

from actors.testing import Simulation, simulate
from tests.simulated import simulated_world
from volant.mcp._tools import tools
from volant.model import TRANSITIONS
from volant.operations import TABLE

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PAGES = [*REPOSITORY.glob("*.md"), *DOCS.rglob("*.md")]

_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
_CODE = re.compile(r"^```.*?^```|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def test_every_link_leads_somewhere() -> None:
    broken = []
    for page in PAGES:
        for path, anchor in _LINK.findall(_CODE.sub("", page.read_text())):
            target = (page.parent / path).resolve() if path else page
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{page.relative_to(REPOSITORY)}: {path}#{anchor}")
    assert not broken


def test_the_index_leads_to_every_page() -> None:
    index, decisions = DOCS / "index.md", DOCS / "decisions" / "README.md"
    assert not {page for page in DOCS.rglob("*.md") if page != index} - linked(index) - linked(decisions)
    assert index in linked(REPOSITORY / "README.md")
    assert decisions in linked(index)


def linked(page: Path) -> set[Path]:
    """Returns the files that a page links to."""
    return {(page.parent / path).resolve() for path, _ in _LINK.findall(page.read_text()) if path}


def test_every_promise_of_the_security_page_names_a_test_that_exists() -> None:
    page = (REPOSITORY / "docs/explanation/security.md").read_text()
    rows = re.findall(r"^\| (?!promise \||---)(.+) \| (.+) \|$", page.partition("## Attackers and promises")[2], re.M)
    assert rows
    missing = []
    for promise, tests in rows:
        named = re.findall(r"`([\w/.]+\.py)(?:::(\w+))?`", tests)
        if not named:
            missing.append(f"{promise}: names no test")
        for path, function in named:
            file = REPOSITORY / "tests" / path
            if not file.is_file() or (function and function not in functions(file)):
                missing.append(f"{promise}: tests/{path}::{function}")
    assert not missing


def functions(module: Path) -> set[str]:
    """Returns the names of the functions that a module defines, those of its classes included."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, definitions)}


def test_the_architecture_page_lists_the_rooms_in_the_order_of_their_layers() -> None:
    page = (DOCS / "explanation/architecture.md").read_text()
    cells = re.findall(r"^\| (`[^|]+/`) \|", page, re.M)
    *rooms, last = [room for cell in cells for room in re.findall(r"`(?:volant/)?(\w+)/`", cell)]
    assert last == "actors"
    assert sorted(rooms) == sorted(package.parent.name for package in REPOSITORY.glob("volant/*/__init__.py"))
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract["type"] == "layers"]
    depth = {room: number for number, layer in enumerate(layers) for room in layer.split(" | ")}
    assert rooms == sorted(rooms, key=lambda room: depth[room])


def test_the_architecture_page_shows_the_supervisor_tree(tmp_path: Path) -> None:
    page = (DOCS / "explanation/architecture.md").read_text()
    children: list[str] = []

    async def main(sim: Simulation) -> None:
        async with simulated_world(sim, tmp_path) as world:
            await world.start_daemon()
            tree = (await world.request("GET", "/api/v1/system/tree")).json()
            children.extend(child["name"] for child in tree["children"])

    simulate(main, seed=1, faults={})
    shown = re.findall(r"^  volantd(?:\[.*\])? --> (\w+)", page, re.M)
    # The simulated world has images of its own, which nobody has to keep.
    assert [name for name in shown if name != "oci"] == children


def test_the_page_of_vms_lists_every_transition() -> None:
    page = (DOCS / "explanation/vm.md").read_text().partition("## Transitions")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+) \|$", page, re.M)
    listed = {(before, after) for before, cell in rows for after in re.findall(r"`(\w+)`", cell)}
    assert listed == {(before, after) for before, after in TRANSITIONS if before and after}


def test_the_page_of_mcp_names_every_tool() -> None:
    page = (REPOSITORY / "docs/how-to/mcp.md").read_text()
    assert not [tool.name for tool in tools(TABLE) if f"`{tool.name}`" not in page]


def anchors(page: Path) -> set[str]:
    """Returns the anchors that GitHub makes from the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.M), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
