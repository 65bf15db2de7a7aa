"""Stock images: OCI images of Debian, Python and Node.js from Debian's packages, for hosts without a registry.

mmdebstrap installs the packages, so `apt`, `pip` and `npm` work in a VM with a network.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import trio
from msgspec import structs

from . import _packages, _store
from ._child import run_child
from ._errors import ImageError
from ._mmdebstrap import Bootstrap
from ._oci_archive import write_archive
from ._packages import THIS_HOST, Archive
from ._progress import WAITING, Progress, silent

_BASE = ("ca-certificates", "debian-archive-keyring", "mount", "netbase", "passwd", "tzdata")
"""The packages of all images, besides Debian's essential ones and apt."""
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_DPKG_OPTIONS = (
    # Documentation and translations, as in other slim images; licences stay. It holds for what is installed later, too.
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    *(f"path-exclude=/usr/share/{name}/*" for name in ("info", "lintian", "locale", "man")),
    # pip may install packages in a VM.
    "path-exclude=/usr/lib/python3*/EXTERNALLY-MANAGED",
)
_FASTER = "etc/dpkg/dpkg.cfg.d/00faster"
"""A half-written tree is thrown away, so dpkg need not wait for the disk."""
_DEADLINE_S = 1800.0
"""The maximum time for a build in a child process: that of `node` takes two minutes on two slow processors, and more
with a slow network."""


class StockImage(msgspec.Struct, frozen=True, kw_only=True):
    """The recipe of a stock image."""

    repository: str
    """The repository in the image's reference. The tag is the version of the package `versioned_by`."""
    packages: tuple[str, ...]
    command: str
    """Runs if a VM has no command of its own."""
    versioned_by: str = ""
    """If empty, the tag is Debian's version."""
    parts: int = 1
    """The number of parts of that version that are in the tag."""
    links: dict[str, str] = {}
    """Symbolic links to create: the target by path."""


STOCK = {
    "debian": StockImage(repository="debian", packages=_BASE, command="bash"),
    "python": StockImage(
        repository="python",
        packages=(*_BASE, "python3", "python3-pip", "python3-venv"),
        command="python3",
        versioned_by="python3",
        parts=2,
        links={"usr/local/bin/python": "/usr/bin/python3"},
    ),
    "node": StockImage(repository="node", packages=(*_BASE, "nodejs", "npm"), command="node", versioned_by="nodejs"),
}
"""The stock images by name."""


class BuiltStock(msgspec.Struct, frozen=True):
    """An archive that was written."""

    reference: str
    """The image's reference, which begins with `localhost/`."""
    digest: str
    size_bytes: int
    packages: int


def build_stock(
    name: str,
    target: Path,
    cache_dir: Path,
    *,
    archive: Archive = THIS_HOST,
    progress: Callable[[Progress], None] = silent,
) -> BuiltStock:
    """Writes an OCI archive with a stock image; blocks for a minute or more.

    The user must be root, have subordinate IDs, or have fakechroot.

    :param name: a name in `STOCK`
    :param target: the path of the archive
    :param cache_dir: a folder for packages
    :raises ImageError: the image can't be built
    """
    recipe = STOCK.get(name)
    if recipe is None:
        raise ImageError("unknown_image", f"There is no stock image {name!r}", f"one of {', '.join(STOCK)}")
    folder = cache_dir.absolute() / name
    with _store.building(folder, lambda: progress(WAITING)) as scratch:
        layer, made = scratch / "layer.tar", target.with_name(f".{target.name}.new")
        packages = _packages.make(_bootstrap(recipe), layer, folder, scratch, archive, progress)
        version = next((each.version for each in packages if each.name == recipe.versioned_by), "13")
        reference = f"localhost/{recipe.repository}:{'.'.join(version.split('.')[: recipe.parts])}"
        progress(Progress("write", "Writing the image"))
        config: dict[str, object] = {"Env": [f"PATH={_PATH}"], "Cmd": [recipe.command], "WorkingDir": "/"}
        newest = max(_built_at(folder / "packages" / "archives" / each.filename) for each in packages)
        digest = write_archive(made, layer, config, reference, newest)
        made.replace(target)
        return BuiltStock(reference, digest, target.stat().st_size, len(packages))


async def build_stock_in_child(
    name: str,
    target: Path,
    cache_dir: Path,
    *,
    archive: Archive = THIS_HOST,
    progress: Callable[[Progress], None] | None = None,
) -> BuiltStock:
    """Calls `build_stock` in a child process. Cancelling kills it.

    :raises ImageError: the image can't be built; `timeout` after half an hour
    """
    command = ["stock", name, "--cache", str(cache_dir), "--output", str(target)]
    for field, value in structs.asdict(archive).items():
        if value:
            command += [f"--{field.replace('_', '-')}", *([] if value is True else [str(value)])]
    with trio.move_on_after(_DEADLINE_S):
        return msgspec.convert((await run_child(command, progress))["stock"], BuiltStock)
    raise ImageError("timeout", f"The image was not built within {_DEADLINE_S:g} s", "check the network")


def _bootstrap(recipe: StockImage) -> Bootstrap:
    links = [f'--customize-hook=ln -s {leads_to} "$1/{path}"' for path, leads_to in recipe.links.items()]
    return Bootstrap(
        variant="apt",
        include=recipe.packages,
        options=(
            *(f"--dpkgopt={option}" for option in _DPKG_OPTIONS),
            f'--setup-hook=echo force-unsafe-io >"$1/{_FASTER}"',
            f'--customize-hook=rm "$1/{_FASTER}"',
            *links,
        ),
    )


def _built_at(deb: Path) -> int:
    """Returns when a package was built, in seconds since 1970: the time of its archive's first member; see ar(5)."""
    with deb.open("rb") as handle:
        return int(handle.read(36)[24:])
