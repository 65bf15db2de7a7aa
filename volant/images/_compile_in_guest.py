"""Runs under the guest's own Python: imports the guest's modules, and compiles all modules that are loaded then.

Arguments: the folder of our packages, the folder of the standard library, the output folder, the names of the modules.
`verify` instead of the output folder only imports them.

The output is the same on any machine: one process, sorted order, a fixed hash seed (from the caller), and file names as
in the guest.
"""

# ruff: noqa: PTH100, PTH103, PTH118, PTH120, PTH123, T201 - what is imported here goes into the image, and print is the answer

from __future__ import annotations

import importlib
import importlib._bootstrap_external as external
import importlib.util
import os
import sys

_TARGETS = {"packages": "/usr/lib/volant", "stdlib": "/usr/lib/python3.13"}


def _import_all(names: list[str]) -> None:
    for name in names:
        importlib.import_module(name)


def _needed(folders: dict[str, str]) -> list[tuple[str, str]]:
    """Returns (place, relative path) of the source of each loaded module."""
    found: set[tuple[str, str]] = set()
    for module in list(sys.modules.values()):
        spec = getattr(module, "__spec__", None)
        origin = getattr(spec, "origin", None)
        candidates = [origin, getattr(module, "__file__", None)]
        for candidate in candidates:
            # The path of a built-in module is "built-in", and of one that is frozen into the binary "frozen".
            path = os.path.abspath(candidate) if isinstance(candidate, str) else ""
            for place, folder in folders.items():
                if path.startswith(folder + "/"):
                    found.add((place, path[len(folder) + 1 :]))
    return sorted(found)


def main() -> None:
    """Imports and compiles, as the arguments say."""
    packages, stdlib, output = (os.path.abspath(path) for path in sys.argv[1:4])
    names = sys.argv[4:]
    # Not the folder of this script, which is the host's.
    sys.path[:] = [packages, stdlib]
    sys.dont_write_bytecode = True
    _import_all(names)
    if sys.argv[3] == "verify":
        print("verified")
        return
    folders = {"packages": packages, "stdlib": stdlib}
    for place, path in _needed(folders):
        source = os.path.join(folders[place], path)
        if not path.endswith(".py"):
            raise SystemExit(f"{path} is not a Python source, and the image takes nothing else")
        with open(source, "rb") as handle:
            text = handle.read()
        code = compile(text, f"{_TARGETS[place]}/{path}", "exec", dont_inherit=True, optimize=2)
        # An unchecked hash: no time stamp, and no source is needed at run time (PEP 552).
        data = external._code_to_hash_pyc(  # type: ignore[attr-defined]  # what py_compile uses
            code, importlib.util.source_hash(text), checked=False
        )
        target = os.path.join(output, place, path + "c")
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "wb") as handle:
            handle.write(data)
    print("compiled")


main()
