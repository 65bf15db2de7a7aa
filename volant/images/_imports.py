"""Finds the imports of a module by its syntax tree, also inside functions, where verifying the image misses them."""

from __future__ import annotations

import ast


def imported_modules(source: bytes) -> set[str]:
    """Returns the modules of absolute imports, but for those under `TYPE_CHECKING`."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found.add(node.module)
        elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            nodes.extend(node.orelse)
        else:
            nodes.extend(ast.iter_child_nodes(node))
    return found
