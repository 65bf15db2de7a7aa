"""The docstrings of members, for schemas and for help."""

from __future__ import annotations

import ast
import inspect
import textwrap
import threading
from functools import cache
from itertools import pairwise

_SYNTAX_TREES = threading.Lock()
"""Held by a thread while it creates syntax trees. On Python 3.11 all threads share one counter of the depth, so two at
once may fail with a SystemError: garbage collection can run Python code in the middle, and another thread continues
there."""


@cache
def member_texts(owner: type) -> dict[str, str] | None:
    """Returns the docstring of each member of a class; None for a class without source.

    A type created by a call, whose members' names are not valid in Python, has no source.
    """
    # On Python 3.11, `getsource` parses the whole module.
    with _SYNTAX_TREES:
        try:
            source = inspect.getsource(owner)
        except OSError:
            return None
        definition = ast.parse(textwrap.dedent(source)).body[0]
    assert isinstance(definition, ast.ClassDef)
    texts = {}
    for member, after in pairwise(definition.body):
        match member, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    return texts
