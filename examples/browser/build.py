"""Builds the browser plugin: a root filesystem with Debian's Chromium, and the manifest that names it.

    python examples/browser/build.py --output DIR
    volar plugins install DIR/manifest.json

Nobody needs to be root, nothing is mounted, and nothing of this host's configuration gets into the image. The same
packages make the same bytes. A second run with nothing new takes the time that asking the archive takes.

Packages are unpacked and not installed: their maintainer scripts would need a system to run in. What of those scripts
matters is done here: a user for the browser, the links of a merged /usr, Python's byte code. The linker needs no cache,
as all libraries lie where it looks anyway; nor does fontconfig, for one family of fonts.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from volant.images import ImageError, Package, Progress, fetch_packages

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from workload import _catalogue as catalogue  # noqa: E402 - it lies beside this file

CHROMIUM = "chromium-headless-shell"
PACKAGES = (CHROMIUM, "fonts-dejavu-core", "python3.13-minimal", "libpython3.13-stdlib", "busybox-static")
WITHOUT = ("x11-utils", "xdg-utils", "mesa-libgallium", "debconf")
"""What packages depend on for desktops, graphics cards and questions during an installation: half of all files."""
PROGRAMS = {"dpkg-deb": "dpkg", "mke2fs": "e2fsprogs", "debugfs": "e2fsprogs"}
"""What builds the image, and the packages of this host that have it."""
SIZE_MB = 1024
"""Of the filesystem; what is not used takes no space."""
INODES = 65536
JOURNAL_MB = 16
UID = 1000
EPOCH = 946684800
"""2000-01-01, for all times in the image; those who hash images want them to be the same tomorrow."""
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
    """Do what the command line says; return the exit code."""
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
        with locked(output):
            packages = fetch_packages(
                output / "packages",
                PACKAGES,
                without=WITHOUT,
                progress=say.progress,
                mirror=options.mirror,
                security_mirror=options.security_mirror,
                keyring=options.keyring,
                offline=options.offline,
            )
            build(output, packages, say)
    except ImageError as error:
        say(f"error: {error}")
        return 1
    except OSError as error:
        say(f"error: {error}")
        return 1
    print(output / "manifest.json")
    return 0


class Teller:
    """Says to people, on standard error, what is done."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, text: str) -> None:
        if text != self._last:
            print(text, file=sys.stderr, flush=True)
        self._last = text

    def progress(self, progress: Progress) -> None:
        """Say how far the packages are, in steps of a tenth."""
        if progress.unit == "bytes" and progress.done < progress.total:
            tenths = 10 * progress.done // progress.total
            self(f"{progress.message}: {10 * tenths} % of {progress.total / 1e6:.0f} MB")
        else:
            self(progress.message)


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the output folder: one builder at a time, the others wait."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for path in output.glob("build-*"):
            shutil.rmtree(path, ignore_errors=True)
        yield


def build(output: Path, packages: Mapping[Package, Path], say: Teller) -> None:
    """Make `rootfs.img` and `manifest.json`, unless they are there and made of just this."""
    record = output / "build.json"
    key = digest_of_inputs(packages)
    if is_built(output, record, key):
        say("The image is up to date")
        return
    with tempfile.TemporaryDirectory(dir=output, prefix="build-") as folder:
        scratch = Path(folder)
        root = scratch / "root"
        root.mkdir()
        say("Unpacking")
        for file in packages.values():
            run("dpkg-deb", "-x", str(file), str(root))
        arrange(root)
        say("Compiling Python's modules")
        compile_python(root)
        make_uniform(root)
        say("Writing the filesystem")
        image = scratch / "rootfs.img"
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


def digest_of_inputs(packages: Mapping[Package, Path]) -> str:
    """Return a digest of all that decides about the image."""
    parts = [f"{package.name} {package.version} {package.sha256}" for package in packages]
    for path in (Path(__file__), *workload_files()):
        parts += [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}"]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def workload_files() -> list[Path]:
    """Return what runs in the VM."""
    return sorted((HERE / "workload").glob("*.py"))


def is_built(output: Path, record: Path, key: str) -> bool:
    """Return whether the output is whole, and made of what `key` says."""
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
    """Make a root filesystem of what the packages have brought."""
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
    """Compile the modules with the Python that will run them: under emulation that costs a start seconds."""
    linker = root / "usr/lib64/ld-linux-x86-64.so.2"
    # Relative, as what ends up in the byte code must not depend on where this is.
    python = ["--library-path", "./usr/lib/x86_64-linux-gnu", f"./usr/bin/{PYTHON}", "-B", "-s", "-S", "-P"]
    options = ["-q", "-s", ".", "-p", "/", "--invalidation-mode", "unchecked-hash"]
    environment = {"PYTHONHASHSEED": "0", "PYTHONHOME": "./usr", "LC_ALL": "C.UTF-8", "TZ": "UTC", "PATH": ""}
    command = [str(linker), *python, "-m", "compileall", *options, f"./usr/lib/{PYTHON}", "./opt/browser"]
    run(*command, cwd=root, env=environment)


def make_uniform(root: Path) -> None:
    """Give all files the modes and times that they have whoever builds; nothing in there needs to be setuid."""
    for path in [root, *root.rglob("*")]:
        if not path.is_symlink():
            runs = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
            path.chmod(0o755 if runs else 0o644)
    for name, mode in DIRECTORIES.items():
        (root / name).chmod(mode)
    for path in [*root.rglob("*"), root]:
        os.utime(path, (EPOCH, EPOCH), follow_symlinks=False)


def make_filesystem(root: Path, image: Path, key: str) -> None:
    """Write `root` as ext4 to `image`, all files root's but the browser's home."""
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
    """Return the plugin's manifest."""
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
    """Put JSON in the place of `path`."""
    temporary = path.with_name(f"{path.name}.new")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def located(program: str) -> str:
    """Return where a program is; :raises ImageError: it is nowhere."""
    # Those that make filesystems are not in the path of those who are not root.
    found = shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        hint = f"sudo apt-get install {PROGRAMS.get(program, program)}"
        raise ImageError("no_program", f"There is no {program} on this host", hint)
    return found


def run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Return all that a command writes; :raises ImageError: there is no such program, or it fails."""
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
