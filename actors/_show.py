"""A tree of supervisors as text for people, made of `System.tree()`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

Node: TypeAlias = "Mapping[str, Any]"


def as_text(tree: Node) -> str:
    """Returns one line for each child, drawn as the command `tree` does."""
    return "\n".join(_lines(tree, "", ""))


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
