"""Compiles Python modules to byte code, with the guest's own Python.

Debian ships sources, and compiling them takes a second of each boot under emulation. The host's Python may have another
version or magic number. So the guest's Python is started from the unpacked packages through the dynamic linker, with an
empty environment; nothing is installed.

Only byte code goes into the image (`name.pyc` instead of `name.py`): half the size, and half the files.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from ._errors import ImageError

_TIMEOUT_S = 60.0
_STDLIB = "usr/lib/python3.13"


def compile_modules(
    files: Mapping[str, bytes], packages: Mapping[str, bytes], roots: Iterable[str], scratch: Path
) -> dict[str, bytes]:
    """Returns the byte code of modules and their imports, by path in the image.

    :param files: the guest's binaries and standard library, by path in the image
    :param packages: the sources of `/usr/lib/volant`
    :param roots: the modules
    :param scratch: a folder for temporary files
    :raises ImageError: the guest's Python does not run here, or can't import a module
    """
    with tempfile.TemporaryDirectory(dir=scratch, prefix="compile-") as folder:
        root = Path(folder)
        for path, data in files.items():
            _write(root / path, data)
        for path, data in packages.items():
            _write(root / "usr/lib/volant" / path, data)
        output = root / "output"
        output.mkdir()
        _run(root, ["output", *sorted(roots)])
        compiled = {}
        for place, target in (("packages", "usr/lib/volant"), ("stdlib", _STDLIB)):
            for found in sorted((output / place).rglob("*.pyc")):
                compiled[f"{target}/{found.relative_to(output / place)}"] = found.read_bytes()
    return compiled


def verify_modules(files: Mapping[str, bytes], roots: Iterable[str], scratch: Path) -> None:
    """Imports `roots` with the files of the finished image only. :raises ImageError: a file is missing."""
    with tempfile.TemporaryDirectory(dir=scratch, prefix="verify-") as folder:
        root = Path(folder)
        for path, data in files.items():
            _write(root / path, data)
        _run(root, ["verify", *sorted(roots)])


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(0o755)


def _run(root: Path, arguments: list[str]) -> None:
    script = Path(__file__).with_name("_compile_in_guest.py").read_bytes()
    # Relative paths, so that no path of this machine gets into the byte code.
    command = [
        "./usr/lib64/ld-linux-x86-64.so.2",
        "--library-path",
        "./usr/lib/x86_64-linux-gnu",
        "./usr/bin/python3.13",
        *("-B", "-s", "-S", "-P"),
        "-",
        "usr/lib/volant",
        _STDLIB,
        *arguments,
    ]
    environment = {"PYTHONHASHSEED": "0", "PYTHONHOME": "./usr", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, input=script, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ImageError("compile_failed", f"Compiling took more than {_TIMEOUT_S:.0f} s") from None
    except OSError as error:
        raise ImageError(
            "compile_failed",
            f"The guest's Python does not start here: {error}",
            "images are built on x86-64, in a cache folder on a file system that is not mounted noexec",
        ) from None
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-3:]
        raise ImageError("compile_failed", "The guest's modules can't be compiled: " + " | ".join(last))
