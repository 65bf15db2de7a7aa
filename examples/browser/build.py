"""Builds the browser plugin: a root filesystem with Debian's Chromium, and the manifest that names it.

    python examples/browser/build.py --output DIR
    volar plugins install DIR/manifest.json

It needs neither root nor mounts, and copies none of this host's configuration into the image. The same packages make
the same bytes. A run without new packages leaves the image as it is.

mmdebstrap unpacks the packages. They are not installed, because their maintainer scripts need root. This script does
the parts that matter: a user for the browser, the links of a merged /usr, Python's byte code. The linker needs no
cache, because all libraries are in its default directories; nor does fontconfig, for one family of fonts.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from volant.images import Archive, ImageError, Package, Progress, extract_packages

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from workload import _catalogue as catalogue  # type: ignore[import-not-found]  # noqa: E402 - next to this file

CHROMIUM = "chromium-headless-shell"
PACKAGES = (CHROMIUM, "fonts-dejavu-core", "python3.13-minimal", "libpython3.13-stdlib", "busybox-static")
WITHOUT = ("x11-utils", "xdg-utils", "mesa-libgallium", "debconf")
"""Dependencies for desktops, graphics cards and the questions of an installation, left out: half of all files."""
PROGRAMS = {"mmdebstrap": "mmdebstrap", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs"}
"""The programs that build the image, and the Debian packages that contain them."""
SIZE_MB = 1024
"""Size of the filesystem; the file is sparse."""
INODES = 65536
JOURNAL_MB = 16
UID = 1000
EPOCH = 946684800
"""2000-01-01: the time of all files in the image, so that the same packages give the same digest."""
PYTHON = "python3.13"

LINKS = {
    "bin": "usr/bin",
    "sbin": "usr/sbin",
    "lib": "usr/lib",
    "lib64": "usr/lib64",
    "usr/bin/python3": PYTHON,
    "etc/mtab": "/proc/self/mounts",
    "var/run": "/run",
}
DIRECTORIES = {
    "dev": 0o755,
    "home/browser": 0o755,
    "mnt": 0o755,
    "opt": 0o755,
    "proc": 0o755,
    "root": 0o700,
    "run": 0o755,
    "srv/www": 0o755,
    "sys": 0o755,
    "tmp": 0o1777,
    "usr/sbin": 0o755,
    "var/cache": 0o755,
    "var/lib": 0o755,
    "var/tmp": 0o1777,
}
FILES = {
    "etc/passwd": f"root:x:0:0:root:/root:/bin/sh\nbrowser:x:{UID}:{UID}:Chromium:/home/browser:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
    "etc/group": f"root:x:0:\ntty:x:5:\nbrowser:x:{UID}:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
    "srv/www/index.html": "<!doctype html>\n<title>It works</title>\n<h1>It works</h1>\n"
    "<p>This page lies in the virtual machine, in <code>/srv/www</code>.</p>\n",
}
_COMMAND_S = 300.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Build the browser plugin.")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets rootfs.img and manifest.json")
    parser.add_argument("--mirror", metavar="URL", help="a Debian mirror, in the place of this host's apt sources")
    parser.add_argument("--security-mirror", metavar="URL", help="with --mirror: where security updates come from")
    parser.add_argument("--keyring", type=Path, metavar="FILE", help="the keys that must have signed the mirror")
    parser.add_argument("--offline", action="store_true", help="take the packages of the last build")
    options = parser.parse_args(arguments)
    output: Path = options.output.resolve()
    say = Teller()
    try:
        for program in PROGRAMS:
            located(program)
        with locked(output), tempfile.TemporaryDirectory(dir=output, prefix="build-") as scratch:
            root = Path(scratch, "root")
            packages = extract_packages(
                output / "packages",
                PACKAGES,
                root,
                without=WITHOUT,
                progress=say.progress,
                archive=Archive(options.mirror, options.security_mirror, options.keyring, options.offline),
            )
            build(output, root, packages, say)
    except ImageError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {error}")
        return 1
    print(output / "manifest.json")
    return 0


class Teller:
    """Reports progress on standard error."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, text: str) -> None:
        if text != self._last:
            print(text, file=sys.stderr, flush=True)
        self._last = text

    def progress(self, progress: Progress) -> None:
        """Reports the progress of the downloads in steps of ten percent."""
        if progress.unit == "bytes" and progress.done < progress.total:
            tenths = 10 * progress.done // progress.total
            self(f"{progress.message}: {10 * tenths} % of {progress.total / 1e6:.0f} MB")
        else:
            self(progress.message)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Locks the output directory: one builder at a time, the others wait."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for path in output.glob("build-*"):
            shutil.rmtree(path, ignore_errors=True)
        yield


def build(output: Path, root: Path, packages: Sequence[Package], say: Teller) -> None:
    """Makes `rootfs.img` and `manifest.json` of the packages unpacked in `root`, unless they are up to date."""
    record = output / "build.json"
    key = digest_of_inputs(packages)
    if is_built(output, record, key):
        say("The image is up to date")
        return
    arrange(root)
    say("Compiling Python's modules")
    compile_python(root)
    make_uniform(root)
    say("Writing the filesystem")
    image = root.with_name("rootfs.img")
    make_filesystem(root, image, key)
    say("Computing its digest")
    with image.open("rb") as handle:
        sha256 = hashlib.file_digest(handle, "sha256").hexdigest()
    version = next(package.version for package in packages if package.name == CHROMIUM)
    record.unlink(missing_ok=True)
    image.replace(output / "rootfs.img")
    write(output / "manifest.json", manifest(output / "rootfs.img", sha256, version))
    write(record, {"inputs": key, "sha256": sha256, "size": SIZE_MB << 20})
    say(f"The image has Chromium {version}, and {(output / 'rootfs.img').stat().st_blocks >> 11} MiB")


def digest_of_inputs(packages: Sequence[Package]) -> str:
    """Returns a digest of everything that determines the image."""
    parts = [f"{package.name} {package.version} {package.sha256}" for package in packages]
    for path in (Path(__file__), *workload_files()):
        parts += [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def workload_files() -> list[Path]:
    """Returns the files that run in the VM."""
    return sorted((HERE / "workload").glob("*.py"))


def is_built(output: Path, record: Path, key: str) -> bool:
    """Returns whether the output is complete and was made from `key`."""
    try:
        known = json.loads(record.read_text())
        boot = json.loads((output / "manifest.json").read_text())["boot"]["rootfs"]
        image = output / "rootfs.img"
        return bool(
            known["inputs"] == key
            and boot == {"url": str(image), "sha256": known["sha256"]}
            and image.stat().st_size == known["size"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def arrange(root: Path) -> None:
    """Completes the root filesystem in `root`, where the packages are unpacked."""
    for name in DIRECTORIES:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    for name, target in LINKS.items():
        (root / name).symlink_to(target)
    workload = root / "opt" / "browser"
    workload.mkdir()
    for path in workload_files():
        shutil.copyfile(path, workload / path.name)
    applets = run(str(root / "usr/bin/busybox"), "--list").split()
    for name in applets:
        if not (root / "usr/bin" / name).exists() and not (root / "usr/sbin" / name).exists():
            (root / "usr/bin" / name).symlink_to("busybox")


def compile_python(root: Path) -> None:
    """Compiles the modules with the Python that will run them: under emulation, that would slow a start by seconds."""
    linker = root / "usr/lib64/ld-linux-x86-64.so.2"
    # Relative, so that the byte code does not contain this host's paths.
    python = ["--library-path", "./usr/lib/x86_64-linux-gnu", f"./usr/bin/{PYTHON}", "-B", "-s", "-S", "-P"]
    options = ["-q", "-s", ".", "-p", "/", "--invalidation-mode", "unchecked-hash"]
    environment = {"PYTHONHASHSEED": "0", "PYTHONHOME": "./usr", "LC_ALL": "C.UTF-8", "TZ": "UTC", "PATH": ""}
    command = [str(linker), *python, "-m", "compileall", *options, f"./usr/lib/{PYTHON}", "./opt/browser"]
    run(*command, cwd=root, env=environment)


def make_uniform(root: Path) -> None:
    """Gives all files the same modes and times on each host, and removes setuid bits."""
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            runs = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if runs else 0o644)
    for name, mode in DIRECTORIES.items():
        (root / name).chmod(mode)
    for path in [*root.rglob("*"), root]:
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)


def make_filesystem(root: Path, image: Path, key: str) -> None:
    """Writes `root` as ext4 to `image`; root owns all files except the browser's home."""
    identity = str(uuid.uuid5(uuid.NAMESPACE_OID, key))
    settings = {"SOURCE_DATE_EPOCH": str(EPOCH), "MKE2FS_CONFIG": "/dev/null", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
    environment = {**os.environ, **settings}
    with image.open("wb") as handle:
        handle.truncate(SIZE_MB << 20)
    run(
        *("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-I", "256", "-m", "0", "-L", "browser", "-U", identity),
        *("-N", str(INODES), "-J", f"size={JOURNAL_MB}", "-d", str(root)),
        *("-E", f"root_owner=0:0,hash_seed={identity},lazy_itable_init=0,lazy_journal_init=0", str(image)),
        env=environment,
    )
    lines = []
    for path in [root, *sorted(root.rglob("*"))]:
        name = f"/{path.relative_to(root)}" if path != root else "/"
        if '"' in name or "\n" in name:
            raise ImageError("bad_package", f"a file has a name that debugfs can't be told: {name!r}")
        owner = UID if name == "/home/browser" else 0
        lines += [f'set_inode_field "{name}" {field} {owner}' for field in ("uid", "gid")]
    script = image.with_name("owners")
    script.write_text("\n".join(lines) + "\n")
    told = run("debugfs", "-w", "-f", str(script), str(image), env=environment)
    complaints = [line for line in told.splitlines() if not line.startswith("debugfs")]
    if complaints:
        raise ImageError("io_error", f"debugfs can't set owners: {complaints[0]}")


def manifest(image: Path, sha256: str, version: str) -> dict[str, object]:
    """Returns the plugin's manifest."""
    return {
        "name": "browser",
        "version": version,
        "description": "Debian's Chromium, headless, with actions and DevTools",
        "resources": {"cpu_cores": 2, "memory_mb": 1024},
        "boot": {"rootfs": {"url": str(image), "sha256": sha256}},
        "workload": {
            "entrypoint": ["/usr/bin/python3", "-m", "browser"],
            "workdir": "/opt",
            "port": catalogue.PORT,
            "restart": "always",
            "health_check": {"path": "/healthz", "interval_s": 10, "timeout_s": 5},
        },
        "devtools": {"port": catalogue.DEVTOOLS_PORT},
        "actions": catalogue.manifest_actions(),
        "openapi": "/openapi.json",
    }


def write(path: Path, value: object) -> None:
    """Replaces `path` with JSON."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def located(program: str) -> str:
    """Returns the path of a program. :raises ImageError: if it is not installed"""
    # Programs for filesystems are not in the PATH of an ordinary user.
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        hint = f"sudo apt-get install {PROGRAMS.get(program, program)}"
        raise ImageError("no_program", f"There is no {program} on this host", hint)
    return found


def run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Returns the output of a command. :raises ImageError: if there is no such program, or it fails"""
    done = subprocess.run(
        [located(command[0]), *command[1:]],
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=_COMMAND_S,
        check=False,
    )
    if done.returncode != 0:
        said = done.stderr.strip() or done.stdout.strip()
        raise ImageError("build_failed", f"{command[0]} failed: {said[-500:]}")
    return done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
