"""Makes kernel and initramfs of packages: a pure function of their bytes and of our guest code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path

from . import _bytecode, _cpio, _debs, _kernel, _recipe
from ._errors import ImageError
from ._imports import imported_modules

_DIST_PACKAGES = "usr/lib/python3/dist-packages/"
_STDLIB = "usr/lib/python3.13/"


def compose(
    debs: Mapping[str, Path], guest: Mapping[str, bytes], scratch: Path, tell: Callable[[str, str], None]
) -> tuple[bytes, _cpio.Tree]:
    """Returns the kernel, and the tree of the initramfs.

    :param debs: the packages by name
    :param guest: our own sources
    :param tell: called with phase and message
    :raises ImageError: a package does not fit the recipe
    """
    tell("unpack", "Unpacking the kernel")
    kernel, modules = _kernel_parts(debs[_kernel_package(debs)])
    tell("unpack", "Unpacking Python and BusyBox")
    binaries = _binaries(debs)
    stdlib: dict[str, bytes] = {}
    for package in ("libpython3.13-minimal", "libpython3.13-stdlib"):
        stdlib |= _debs.read_files(debs[package], lambda path: path.startswith(_STDLIB) and path.endswith(".py"))
    sources = dict(guest)
    for package, library in _recipe.LIBRARIES.items():
        files = _debs.read_files(debs[package], lambda path: path.startswith(_DIST_PACKAGES) and path.endswith(".py"))
        names = {path: path.removeprefix(_DIST_PACKAGES) for path in files}
        sources |= {name: files[path] for path, name in names.items() if name.startswith(f"{library}/")}

    tell("compile", "Compiling the guest's Python modules")
    # All of our modules and their imports, as some are imported late.
    own = {path.removesuffix(".py").replace("/", ".") for path in guest if not path.endswith("/__init__.py")}
    roots = sorted(own.union(_recipe.PYTHON_MODULES, *map(imported_modules, guest.values())))
    compiled = _bytecode.compile_modules(binaries | stdlib, sources, roots, scratch)

    tell("compose", "Putting the initramfs together")
    tree: _cpio.Tree = {path: _cpio.file(data, 0o755) for path, data in binaries.items()}
    tree |= {path: _cpio.file(data) for path, data in compiled.items()}
    # Python finds its home by this file, although `os` is built in.
    landmark = _STDLIB + "os.pyc"
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


def _kernel_package(debs: Mapping[str, Path]) -> str:
    for name in debs:
        if name.startswith("linux-image-") and name != _recipe.KERNEL_METAPACKAGE:
            return name
    raise ImageError("bad_list", "The list of packages has no kernel")


def _kernel_parts(deb: Path) -> tuple[bytes, dict[str, tuple[bytes, tuple[str, ...]]]]:
    files = _debs.read_files(deb, lambda path: path.startswith("boot/vmlinuz-") or path.endswith(".ko.xz"))
    kernels = [data for path, data in files.items() if path.startswith("boot/vmlinuz-")]
    if len(kernels) != 1:
        raise ImageError("bad_kernel", f"The kernel package has {len(kernels)} kernels")
    packed = {
        path.rsplit("/", 1)[1].removesuffix(".ko.xz").replace("-", "_"): data
        for path, data in files.items()
        if path.endswith(".ko.xz")
    }
    return _kernel.unpack_vmlinuz(kernels[0]), _kernel.select_modules(packed, _recipe.KERNEL_MODULES)


def _binaries(debs: Mapping[str, Path]) -> dict[str, bytes]:
    binaries: dict[str, bytes] = {}
    for package in sorted(set(_recipe.BINARIES.values())):
        wanted = tuple(path for path, owner in _recipe.BINARIES.items() if owner == package)
        # A library's name is a link to the file with its version, perhaps in another folder.
        names = tuple(path.rsplit("/", 1)[1] for path in wanted)
        found = _debs.read_files(debs[package], functools.partial(_is_named, names))
        for path in wanted:
            if path not in found:
                raise ImageError("bad_package", f"{package} has no {path}")
            binaries[path] = found[path]
    return binaries


def _is_named(prefixes: tuple[str, ...], path: str) -> bool:
    return path.rsplit("/", 1)[1].startswith(prefixes) if "/" in path else False


def _applets(tree: _cpio.Tree) -> _cpio.Tree:
    taken = {path.rsplit("/", 1)[1] for path in tree if path.startswith(("usr/bin/", "usr/sbin/"))}
    return {f"usr/bin/{name}": _cpio.symlink("busybox") for name in _recipe.APPLETS if name not in taken}
