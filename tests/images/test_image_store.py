"""Images in the cache: named by their inputs, found without a lock, complete or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from contextlib import suppress
from pathlib import Path

import pytest
import trio
from msgspec.structs import replace

from volant.images import (
    Archive,
    Image,
    ImageError,
    Package,
    _build,
    _cpio,
    _kernel,
    _recipe,
    _store,
    build,
    ensure,
    find,
    list_images,
    prune,
)
from volant.images._compose import imported_modules

PACKAGES = [
    Package("b", "1:2-3", "amd64", "b" * 64, 10, "b_1%3a2-3_amd64.deb"),
    Package("linux-image-6", "6-1", "amd64", "a" * 64, 20, "linux-image-6_6-1_amd64.deb"),
]


def place(cache: Path, digest: str = "d" * 64, kernel: bytes = b"kernel") -> Image:
    scratch = cache / f"build-{digest[:8]}"
    scratch.mkdir(parents=True)
    tree = {"init": _cpio.file(b"x", 0o755)}
    _build._place(cache, scratch, digest, "recipe", "guest", PACKAGES, kernel, tree)
    image = _store.load(cache, digest)
    assert image is not None
    return image


def test_an_image_is_named_by_its_inputs() -> None:
    base = _store.image_digest("r", PACKAGES, "g")
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert _store.image_digest("r", reversed(PACKAGES), "g") == base
    # The file name of a package does not matter.
    assert _store.image_digest("r", [replace(PACKAGES[0], filename="x.deb"), PACKAGES[1]], "g") == base
    others = [
        _store.image_digest("R", PACKAGES, "g"),
        _store.image_digest("r", PACKAGES, "G"),
        _store.image_digest("r", PACKAGES[:1], "g"),
        _store.image_digest("r", [replace(PACKAGES[0], sha256="c" * 64), PACKAGES[1]], "g"),
        _store.image_digest("r", [replace(PACKAGES[0], version="2"), PACKAGES[1]], "g"),
    ]
    assert len({base, *others}) == 6


def test_an_empty_cache_has_no_image(tmp_path: Path) -> None:
    assert find(tmp_path) is None
    assert find(tmp_path / "nowhere") is None
    assert list_images(tmp_path) == []


def test_an_image_is_found_when_it_fits_the_recipe_and_the_guest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place(tmp_path)
    assert find(tmp_path) is None
    _store.make_current(tmp_path, "d" * 64)
    image = find(tmp_path)
    assert image is not None
    assert image.current
    assert image.kernel.read_bytes() == b"kernel"
    assert image.min_memory_mb <= 128
    assert [other.digest for other in list_images(tmp_path)] == [image.digest]
    package = tmp_path / "volant"
    shutil.copytree(_recipe._PACKAGE, package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(_recipe, "_PACKAGE", package)
    assert find(tmp_path) == image
    for path in (package / "guest" / "_main.py", package / "images" / "_compose.py"):
        before = path.read_bytes()
        path.write_bytes(before + b"# another agent\n")
        assert find(tmp_path) is None
        assert [other.current for other in list_images(tmp_path)] == [False]
        path.write_bytes(before)
        assert find(tmp_path) == image


@pytest.mark.parametrize("name", ["vmlinux", "initramfs", "image.json"])
def test_an_incomplete_image_is_not_found(tmp_path: Path, name: str) -> None:
    place(tmp_path)
    _store.make_current(tmp_path, "d" * 64)
    path = tmp_path / "images" / ("d" * 64) / name
    path.write_bytes(path.read_bytes()[:-2])
    assert find(tmp_path) is None
    assert list_images(tmp_path) == []


@pytest.mark.parametrize("digest", ["", "../../etc", "d" * 63, "D" * 64, "g" * 64])
def test_a_malformed_digest_is_not_found(tmp_path: Path, digest: str) -> None:
    assert _store.load(tmp_path, digest) is None


def test_pruning_keeps_the_current_image_and_listed_ones(tmp_path: Path) -> None:
    for letter in "abcd":
        place(tmp_path, letter * 64)
    _store.make_current(tmp_path, "b" * 64)
    assert prune(tmp_path, ["c" * 64, "e" * 64]) == ["a" * 64, "d" * 64]
    assert [image.digest[0] for image in list_images(tmp_path)] == ["b", "c"]
    assert prune(tmp_path, []) == ["c" * 64]


def test_the_second_builder_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []
    waiting = threading.Event()

    def second() -> None:
        with _store.locked(tmp_path, waiting.set):
            order.append("second")

    with _store.locked(tmp_path, lambda: order.append("waited for nothing")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(10)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_offline_without_an_earlier_build_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        build(tmp_path, archive=Archive(offline=True))
    assert caught.value.code == "offline"
    assert caught.value.hint


def test_an_unwritable_cache_is_reported() -> None:
    with pytest.raises(ImageError) as caught:
        build(Path("/proc/cache"))  # where not even root can make a folder
    assert caught.value.code == "cache_unwritable"


def test_a_file_instead_of_a_cache_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ImageError) as caught:
        build(tmp_path / "file")
    assert caught.value.code == "cache_unwritable"


def test_the_command_tells_programs_in_json_and_by_its_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "volant.images", "build", "--cache", str(tmp_path), "--offline", "--json-progress"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    last = json.loads(done.stdout.splitlines()[-1])
    assert set(last["error"]) == {"code", "message", "hint"}
    assert subprocess.run([*command[:4]], capture_output=True, check=False, timeout=60).returncode == 2


async def test_ensure_returns_the_current_image_at_once(tmp_path: Path) -> None:
    place(tmp_path)
    _store.make_current(tmp_path, "d" * 64)
    assert (await ensure(tmp_path, deadline_s=0.0)).digest == "d" * 64


async def test_ensure_raises_the_error_of_the_build(tmp_path: Path) -> None:
    with pytest.raises(ImageError) as caught:
        await ensure(tmp_path, deadline_s=60, arguments=("--offline",))
    assert caught.value.code == "offline"


async def test_ensure_ends_the_build_at_its_deadline_and_when_cancelled(tmp_path: Path) -> None:
    def children() -> set[str]:
        found = set()
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if os.fsencode(tmp_path) in path.read_bytes():
                    found.add(path.parent.name)
        return found

    with _store.locked(tmp_path, lambda: None):  # so that the child waits
        with pytest.raises(ImageError) as caught:
            await ensure(tmp_path, deadline_s=2)
        assert caught.value.code == "timeout"
        waits = trio.Event()
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                await ensure(tmp_path, deadline_s=60, progress=lambda progress: waits.set())

            nursery.start_soon(run)
            with trio.fail_after(30):
                await waits.wait()
            nursery.cancel_scope.cancel()
    assert not await trio.to_thread.run_sync(children)


def test_a_malformed_kernel_is_refused() -> None:
    for data in (b"", bytes(1000), bytes(0x202) + b"HdrS" + bytes(100_000)):
        with pytest.raises(ImageError) as caught:
            _kernel.unpack_vmlinuz(data)
        assert caught.value.code == "bad_kernel"


def test_dependencies_of_a_module_are_read() -> None:
    assert _kernel.module_dependencies(b"x\0license=GPL\0depends=a,b_c\0name=d\0") == ("a", "b_c")
    assert _kernel.module_dependencies(b"x\0depends=\0") == ()
    assert _kernel.module_dependencies(b"nothing") == ()


def test_the_guest_gets_no_code_of_the_daemon() -> None:
    sources = _recipe.guest_sources()
    assert sources["volant/model/__init__.py"] == b""
    assert {name.rsplit("/", 1)[0] for name in sources} == {"volant", "volant/model", "volant/guest"}
    assert "volant/guest/_init.py" in sources


def test_imports_in_functions_are_found() -> None:
    source = b"""
import os
from h2.events import A, B
from . import _http
from ._http import C
if TYPE_CHECKING:
    from typing import Any
else:
    import only
def late():
    try:
        from wsproto.connection import D
    except OSError:
        import json as j, re
"""
    assert imported_modules(source) == {"os", "h2.events", "only", "wsproto.connection", "json", "re"}


def test_the_image_and_the_package_declare_the_libraries_of_the_guest() -> None:
    imported = set().union(*map(imported_modules, _recipe.guest_sources().values()))
    libraries = {name.partition(".")[0] for name in imported} - sys.stdlib_module_names - {"volant"}
    assert libraries == {"h2", "hyperframe", "wsproto"}
    assert libraries <= set(_recipe.LIBRARIES.values())
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert libraries <= {re.split(r"[^A-Za-z0-9_-]", each)[0] for each in project["dependencies"]}
