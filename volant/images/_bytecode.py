"""Byte code for the guest, made by the guest's own Python.

Debian ships sources; compiling them in each boot takes a second under emulation. The host's Python is of another
version, or differs in a patch that changes the magic number, so the Python that will run the code compiles it: it is
started through the dynamic linker out of the unpacked packages, with an empty environment, and needs nothing installed.

Only byte code goes into the image (`name.pyc` in the place of `name.py`): half the size, and half the files.
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
    """Return the byte code of `roots` and of everything that they import, by path in the image.

    `files` are the guest's binaries and standard library by path in the image; `packages` are the sources that will be
    in `/usr/lib/volant`. Writes beneath `scratch` alone, and leaves nothing there.

    :raises ImageError: the guest's Python does not run here, or a module can't be imported by it
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
    """Import `roots` with nothing but `files`, which are those of the finished image.

    :raises ImageError: something that they need is missing
    """
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
    # Relative paths: what the process sees of this machine is as little as can be.
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
