"""Makes kernel and initramfs of unpacked packages and of our guest code: a pure function of their bytes."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from pathlib import Path

from . import _bytecode, _cpio, _kernel, _recipe
from ._errors import ImageError


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


_DIST_PACKAGES = "usr/lib/python3/dist-packages"
_STDLIB = "usr/lib/python3.13"


def compose(
    root: Path, guest: Mapping[str, bytes], scratch: Path, tell: Callable[[str, str], None]
) -> tuple[bytes, _cpio.Tree]:
    """Returns the kernel, and the tree of the initramfs.

    :param root: the folder with the unpacked packages
    :param guest: our own sources
    :param tell: called with phase and message
    :raises ImageError: a package does not fit the recipe
    """
    root = root.resolve()
    tell("unpack", "Unpacking the kernel")
    kernel, modules = _kernel_parts(root)
    binaries = {path: _read(root, path) for path in _recipe.BINARIES}
    stdlib = {f"{_STDLIB}/{name}": data for name, data in _python_sources(root / _STDLIB).items()}
    sources = dict(guest)
    for library in _recipe.LIBRARIES.values():
        found = _python_sources(root / _DIST_PACKAGES / library)
        sources |= {f"{library}/{name}": data for name, data in found.items()}

    tell("compile", "Compiling the guest's Python modules")
    # All of our modules and their imports, as some are imported late.
    own = {path.removesuffix(".py").replace("/", ".") for path in guest if not path.endswith("/__init__.py")}
    roots = sorted(own.union(_recipe.PYTHON_MODULES, *map(imported_modules, guest.values())))
    compiled = _bytecode.compile_modules(binaries | stdlib, sources, roots, scratch)

    tell("compose", "Putting the initramfs together")
    tree: _cpio.Tree = {path: _cpio.file(data, 0o755) for path, data in binaries.items()}
    tree |= {path: _cpio.file(data) for path, data in compiled.items()}
    # Python finds its home by this file, although `os` is built in.
    landmark = f"{_STDLIB}/os.pyc"
    if landmark not in compiled:
        raise ImageError("compile_failed", "The standard library has no os module")
    _bytecode.verify_modules(binaries | compiled, roots, scratch)
    tree |= {f"usr/lib/modules/{name}.ko": _cpio.file(data) for name, (data, _) in modules.items()}
    lines = [" ".join((name, *needs)) for name, (_, needs) in modules.items()]
    tree["usr/lib/modules/dependencies"] = _cpio.file(("\n".join(lines) + "\n").encode())
    tree |= {path: _cpio.directory(mode) for path, mode in _recipe.DIRECTORIES.items()}
    tree |= {path: _cpio.symlink(target) for path, target in _recipe.SYMLINKS.items()}
    tree |= {path: _cpio.character_device(*device) for path, device in _recipe.DEVICES.items()}
    tree |= {path: _cpio.file(data) for path, data in _recipe.FILES.items()}
    tree |= _applets(tree)
    tree["init"] = _cpio.file(_recipe.INIT, 0o755)
    return kernel, tree


def _kernel_parts(root: Path) -> tuple[bytes, dict[str, tuple[bytes, tuple[str, ...]]]]:
    kernels = list(root.glob("boot/vmlinuz-*"))
    if len(kernels) != 1:
        raise ImageError("bad_kernel", f"The kernel package has {len(kernels)} kernels")
    packed = {
        path.name.removesuffix(".ko.xz").replace("-", "_"): path for path in root.glob("usr/lib/modules/**/*.ko.xz")
    }
    return _kernel.unpack_vmlinuz(kernels[0].read_bytes()), _kernel.select_modules(packed, _recipe.KERNEL_MODULES)


def _read(root: Path, path: str) -> bytes:
    """Returns the content of a file, which may be a link to one with its version in the name."""
    file = (root / path).resolve()
    if not file.is_file() or not file.is_relative_to(root):
        raise ImageError("bad_package", f"No package has {path}")
    return file.read_bytes()


def _python_sources(folder: Path) -> dict[str, bytes]:
    """Returns the modules in a folder, by relative path. Links to settings elsewhere are none."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*.py"))
        if path.resolve().is_relative_to(folder)
    }


def _applets(tree: _cpio.Tree) -> _cpio.Tree:
    taken = {path.rsplit("/", 1)[1] for path in tree if path.startswith(("usr/bin/", "usr/sbin/"))}
    return {f"usr/bin/{name}": _cpio.symlink("busybox") for name in _recipe.APPLETS if name not in taken}
