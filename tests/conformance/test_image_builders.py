"""Images that buildah and umoci have built have the files and the configuration that these tools say they have."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.oci.kit import extract
from tests.oci.registry import PASSWORD, USER, Registry, needs_registry
from tests.oci.test_images import named, opened
from volant.oci import CachedImage, ImageHealthCheck, Port
from volant.oci._erofs import opened as opened_erofs

BUILD_S = 60.0
CAPABILITY = "security.capability"
MAY_BIND = bytes.fromhex("0100000200040000000000000000000000000000")
"""cap_net_bind_service, as `setcap` writes it."""

pytestmark = [
    pytest.mark.programs,
    needs_registry,
    pytest.mark.skipif(
        not all(map(shutil.which, ("buildah", "umoci"))) or os.geteuid() != 0,
        reason="buildah or umoci is not installed, or no root",
    ),
]


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with Registry(tmp_path_factory.mktemp("registry") / "r") as found:
        yield found


def done(*command: str | Path) -> str:
    """Runs a tool to its end; returns what it prints."""
    finished = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_S, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def fill(root: Path) -> None:
    """The first layer: a file of each kind that an image may have."""
    for name in ("bin", "etc", "data/deep", "opaque", "var"):
        (root / name).mkdir(parents=True)
    (root / "bin/su").write_bytes(b"\x7fELF" + os.urandom(70_000))
    (root / "bin/su").chmod(0o6755)
    os.setxattr(root / "bin/su", "user.note", b"kept")
    (root / "bin/serve").write_bytes(b"x")
    os.setxattr(root / "bin/serve", CAPABILITY, MAY_BIND)
    (root / "bin/link").symlink_to("../bin/su")
    (root / "bin/gone").symlink_to("/nowhere")
    (root / "bin/same").hardlink_to(root / "bin/su")
    (root / "etc/ümlaut \n").write_text("a name")
    (root / "etc/removed").write_text("x")
    (root / "etc/large").write_bytes(os.urandom(3_000_000))
    os.mkfifo(root / "var/pipe", 0o640)
    (root / "data").chmod(0o1777)
    (root / "data/deep/file").write_text("below")
    os.chown(root / "data/deep/file", 1000, 1001)
    (root / "opaque/hidden").write_text("x")
    (root / "etc/sparse").touch()
    os.truncate(root / "etc/sparse", 1_000_000)


def change(root: Path) -> None:
    """The second layer, over the first."""
    (root / "etc/removed").unlink()
    shutil.rmtree(root / "opaque")
    (root / "opaque").mkdir()
    (root / "opaque/shown").write_text("y")
    shutil.rmtree(root / "data/deep")
    (root / "data/deep").write_text("a file where a directory was")
    (root / "var/pipe").unlink()
    (root / "var/pipe").mkdir()
    (root / "bin/su").chmod(0o4711)
    (root / "etc/large").write_text("smaller")


class File(NamedTuple):
    """What a guest sees of a file."""

    mode: int
    owner: tuple[int, int]
    names: int
    content: bytes | str
    xattrs: dict[str, bytes]


def files(root: Path) -> dict[str, File]:
    """Returns all below a directory, but for whiteouts, which a VM does not see."""
    found = {}
    for path in sorted(root.rglob("*")):
        info = path.lstat()
        if stat.S_ISCHR(info.st_mode):
            continue
        content: bytes | str = b""
        if path.is_symlink():
            content = str(path.readlink())
        elif stat.S_ISREG(info.st_mode):
            content = path.read_bytes()
        names = 0 if path.is_dir() else info.st_nlink
        attributes = os.listxattr(path, follow_symlinks=False)
        xattrs = {name: os.getxattr(path, name, follow_symlinks=False) for name in attributes}
        found[str(path.relative_to(root))] = File(info.st_mode, (info.st_uid, info.st_gid), names, content, xattrs)
    return found


def check_files(image: CachedImage, root: Path, tree: Path) -> None:
    """Checks that an image has the files below a directory. `tree`: where they may be extracted"""
    assert len(image.layers) == 2
    found, wanted = files(extract(image.metadata, image.layers, tree)), files(root)
    # `fsck.erofs` sets the owner after the attributes, and the kernel takes the capability away then.
    assert wanted["bin/serve"].xattrs.pop(CAPABILITY) == MAY_BIND
    with opened_erofs(image.layers[0]) as layer:
        directory = layer.node(layer.entries(layer.root())[b"bin"].nid)
        program = layer.node(layer.entries(directory)[b"serve"].nid)
        assert layer.xattrs(program) == {CAPABILITY.encode(): MAY_BIND}
    assert found == wanted


def check_config(image: CachedImage) -> None:
    config = image.config
    assert (config.entrypoint, config.cmd) == (("/bin/serve", "-x"), ("one", "two words"))
    assert dict(config.env).items() >= {"MODE": "a=b", "EMPTY": ""}.items()
    assert (config.user, config.working_dir, config.stop_signal) == ("1000:1001", "/data", "SIGINT")
    assert config.exposed_ports == (Port(53, "udp"), Port(80))
    assert dict(config.labels)["team"] == "one, two"
    assert config.volumes == ("/data", "/var/lib/app")


SETTINGS = [
    ("env", "MODE=a=b"), ("env", "EMPTY="), ("user", "1000:1001"), ("workingdir", "/data"), ("label", "team=one, two"),
    ("volume", "/data"), ("volume", "/var/lib/app"),
]  # fmt: skip
OF_BUILDAH = (
    "--stop-signal=SIGINT", "--port=80/tcp", "--port=53/udp", '--entrypoint=["/bin/serve","-x"]',
    "--cmd=one 'two words'",
)  # fmt: skip
OF_UMOCI = (
    "stopsignal=SIGINT", "exposedports=80/tcp", "exposedports=53/udp", "entrypoint=/bin/serve", "entrypoint=-x",
    "cmd=one", "cmd=two words",
)  # fmt: skip
CHECK = ("--healthcheck=CMD /bin/serve --check", "--healthcheck-interval=3s", "--healthcheck-retries=4")


@pytest.mark.parametrize(
    ("form", "options"),
    [("oci", ["--compression-format=zstd"]), ("docker", ["--compression-format=gzip"])],
)
async def test_an_image_of_buildah(tmp_path: Path, registry: Registry, form: str, options: list[str]) -> None:
    places = [f"--root={tmp_path}/storage", f"--runroot={tmp_path}/run", "--storage-driver=vfs"]

    def buildah(*words: str) -> str:
        return done("buildah", *places, *words)

    base = "scratch"
    for edit in (fill, change):
        container = buildah("from", "--pull=never", base)
        root = Path(buildah("mount", container))
        edit(root)
        # Docker's format alone has health checks.
        settings = [f"--{name}={value}" for name, value in SETTINGS]
        buildah("config", *settings, *OF_BUILDAH, *(CHECK if form == "docker" else ()), container)
        base = buildah("commit", "--quiet", f"--format={form}", container)
    name = f"built/{form}"
    target = f"docker://{registry.address}/{name}:t"
    buildah("push", "--quiet", "--tls-verify=false", f"--creds={USER}:{PASSWORD}", *options, base, target)
    async with opened(tmp_path, registry.address) as images:
        found = await images.obtain(named(registry, f"{name}:t"), auth=registry.auth)
        check_config(found)
        check = ImageHealthCheck(command=("/bin/serve", "--check"), interval_s=3.0, timeout_s=30.0, retries=4)
        assert found.config.health_check == (check if form == "docker" else None)
        check_files(found, root, tmp_path / "tree")


async def test_an_image_of_umoci(tmp_path: Path, registry: Registry) -> None:
    layout = tmp_path / "layout"
    image = f"{layout}:t"
    done("umoci", "init", "--layout", layout)
    done("umoci", "new", "--image", image)
    for number, edit in enumerate((fill, change)):
        bundle = tmp_path / f"bundle{number}"
        done("umoci", "unpack", "--image", image, bundle)
        edit(bundle / "rootfs")
        done("umoci", "repack", "--image", image, bundle)
    settings = [f"{name}={value}" for name, value in SETTINGS]
    done("umoci", "config", "--image", image, *(f"--config.{setting}" for setting in (*settings, *OF_UMOCI)))
    registry.push(layout, "built/umoci:t")
    async with opened(tmp_path, registry.address) as images:
        found = await images.obtain(named(registry, "built/umoci:t"), auth=registry.auth)
        check_config(found)
        check_files(found, bundle / "rootfs", tmp_path / "tree")
