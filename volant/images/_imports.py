"""What a module imports, wherever in it: an import inside a function runs too late for an image to be tried with it."""

from __future__ import annotations

import ast


def imported_modules(source: bytes) -> set[str]:
    """Return the modules outside of its own package that a module imports, but for those that only a checker reads."""
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
