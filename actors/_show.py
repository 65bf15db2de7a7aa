"""A tree of supervisors for people: as text, and as a Mermaid flowchart. Both are made of `System.tree()`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from typing import Any, Final, TypeAlias

Node: TypeAlias = "Mapping[str, Any]"

_STYLES: Final = (
    "classDef away stroke-dasharray: 4",
    "classDef crashed stroke: #c00",
)
_ENTITIES: Final = str.maketrans({"#": "#35;", "&": "#amp;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "\n": " "})
"""What Mermaid would take for its own syntax or for HTML. Names and reasons may come from anywhere."""


def as_text(tree: Node) -> str:
    """One line a child, drawn as `tree` does."""
    return "\n".join(_lines(tree, "", ""))


def as_mermaid(tree: Node) -> str:
    """Supervisors are round; what does not run is dashed, and red if it went wrong at last."""
    lines = ["flowchart TD"]
    numbers = count()

    def draw(node: Node, parent: str) -> None:
        own = f"n{next(numbers)}"
        left, right = ("([", "])") if "children" in node else ("[", "]")
        first, *more = (word.translate(_ENTITIES) for word in _words(node))
        style = "" if node["state"] == "running" else ":::crashed" if node["exits"] else ":::away"
        lines.append(f'    {own}{left}"{"<br>".join([first, " ".join(more)])}"{right}{style}')
        if parent:
            lines.append(f"    {parent} --> {own}")
        for child in node.get("children", ()):
            draw(child, own)

    draw(tree, "")
    return "\n".join([*lines, *(f"    {style}" for style in _STYLES)])


def _lines(node: Node, first: str, rest: str) -> list[str]:
    lines = [first + " ".join(_words(node))]
    children = node.get("children", ())
    for child in children:
        last_one = child is children[-1]
        lines += _lines(child, rest + ("└─ " if last_one else "├─ "), rest + ("   " if last_one else "│  "))
    return lines


def _words(node: Node) -> list[str]:
    words = [node["name"], f"[{node['kind']}]", node["state"]]
    if node["restarts"]:
        words.append(f"{node['restarts']} restarts")
    mailbox = node.get("mailbox")
    if mailbox and mailbox["depth"]:
        words.append(f"mailbox {mailbox['depth']}/{mailbox['capacity']}")
        if mailbox["oldest_s"] is not None:
            words.append(f"for {mailbox['oldest_s']:.1f} s")
    if node["exits"]:
        last = node["exits"][-1]
        words.append(f"(at {last['at_s']:.1f} s {last['reason'].splitlines()[0]})")
    return words
