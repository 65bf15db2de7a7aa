"""The inputs of an image, as data for `_compose`.

The suite is pinned, versions are not: the archive drops a version when its update is out. `image.json` records the
versions of a build, and the image's name depends on them.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path

SUITE = "trixie"
COMPONENT = "main"
ARCHITECTURE = "amd64"
PYTHON = "python3.13"

KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
"""Depends on the package with the kernel, whose name has its version."""

WITHOUT = ("initramfs-tools", "kmod", "linux-base", "python3")
"""Dependencies of these packages that no image needs; left out, with what only they need."""

LIBRARIES = {
    "python3-h11": "h11",  # wsproto needs it
    "python3-h2": "h2",
    "python3-hpack": "hpack",  # h2 needs this one and the next
    "python3-hyperframe": "hyperframe",
    "python3-wsproto": "wsproto",
}
"""Debian packages with the Python packages that the agent uses besides the standard library."""

PACKAGES = (
    *LIBRARIES,
    "busybox-static",
    "libc6",
    "libexpat1",
    "libpython3.13-minimal",
    "libpython3.13-stdlib",
    "python3.13-minimal",
    "zlib1g",
)

BINARIES = (
    "usr/bin/busybox",
    "usr/bin/python3.13",
    "usr/lib64/ld-linux-x86-64.so.2",
    "usr/lib/x86_64-linux-gnu/libc.so.6",
    "usr/lib/x86_64-linux-gnu/libm.so.6",
    "usr/lib/x86_64-linux-gnu/libexpat.so.1",
    "usr/lib/x86_64-linux-gnu/libz.so.1",
)
"""Files that are copied into the image."""

KERNEL_MODULES = (
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio-rng",
    "virtio_balloon",
    "pvpanic",
    "pvpanic-pci",
    "pvpanic-mmio",
    "vsock",
    "vmw_vsock_virtio_transport",
    "overlay",
    "squashfs",
    "erofs",
)
"""Kernel modules in the image. Their dependencies are added."""

PYTHON_MODULES = (
    "_sitebuiltins",
    "base64",
    "collections.abc",
    "contextlib",
    "encodings.ascii",
    "encodings.idna",
    "encodings.latin_1",
    "encodings.utf_8",
    "errno",
    "fcntl",
    "grp",
    "h2.config",
    "h2.connection",
    "h2.errors",
    "h2.events",
    "h2.exceptions",
    "h2.settings",
    "hashlib",
    "hmac",
    "json",
    "linecache",
    "os",
    "pwd",
    "random",
    "re",
    "select",
    "selectors",
    "shutil",
    "signal",
    "site",
    "socket",
    "stat",
    "string",
    "struct",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "traceback",
    "typing",
    "warnings",
)
"""Python modules in the image besides the agent and its imports: some that h2 imports late, and some for small scripts.
Their imports are added. No asyncio, http or ssl: each would cost every boot megabytes to unpack."""

INIT = b"""#!/usr/bin/python3.13 -IS
import sys
sys.path.insert(0, "/usr/lib/volant")
from volant.guest._init import main
main()
"""

FILES = {
    "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    "etc/group": b"root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/hosts": b"127.0.0.1 localhost\n::1 localhost\n",
}
DIRECTORIES = {
    "dev": 0o755,
    "mnt": 0o755,
    "proc": 0o555,
    "root": 0o700,
    "run": 0o755,
    "sys": 0o555,
    "tmp": 0o1777,
    # Python warns without it.
    "usr/lib/python3.13/lib-dynload": 0o755,
    "var": 0o755,
}
SYMLINKS = {
    "bin": "usr/bin",
    "sbin": "usr/sbin",
    "lib": "usr/lib",
    "lib64": "usr/lib64",
    "usr/bin/python3": "python3.13",
    "var/run": "../run",
    "var/tmp": "../tmp",
}
APPLETS = """
    [ [[ arch arp ash awk base64 basename bc blkdiscard blockdev bunzip2 bzcat bzip2 cat chgrp chmod chown
    chroot clear cmp cp cpio crc32 cut date dc dd devmem df diff dirname dmesg dnsdomainname du echo egrep env
    expand expr factor fallocate false fdisk fgrep find findfs fold free fsfreeze fstrim ftpget ftpput getfattr
    getopt grep gunzip gzip head hexdump hostid hostname httpd id ifconfig insmod install ionice ip ipcalc kill
    killall less linux32 linux64 ln logger logname losetup ls lsmod md5sum mdev mkdir mke2fs mkfifo mknod mktemp
    modinfo more mount mv nc netstat nl nproc nsenter nslookup od paste patch pidof ping ping6 printf ps pwd
    readlink realpath renice reset rev rm rmdir rmmod route sed seq setpriv setsid sh sha1sum sha256sum sha3sum
    sha512sum shuf sleep sort start-stop-daemon stat strings stty switch_root sync sysctl tac tail tar taskset
    tc tee telnet test tftp time timeout top touch tr traceroute traceroute6 true truncate ts tty udhcpc udhcpc6
    uevent umount uname unexpand uniq unlink unshare unxz unzip uptime usleep vi watch wc wget which whoami
    xargs xxd xz xzcat yes zcat
""".split()  # noqa: SIM905 - a list would fill three screens
"""Names of BusyBox's programs, without those for interactive machines."""

DEVICES = {
    # The kernel opens the console before PID 1 runs.
    "dev/console": (5, 1, 0o600),
    "dev/null": (1, 3, 0o666),
    # Python reads its hash seed before /dev is mounted, when the kernel's pool is not ready.
    "dev/urandom": (1, 9, 0o666),
}

MIN_MEMORY_MB = 112
"""The least memory that a guest boots and serves with. Measured with one CPU: 96 is too little, 104 leaves 7 MiB."""

KERNEL_PARAMETERS = (
    "cryptomgr.notests",
    "initcall_blacklist=jent_mod_init,crypto_kdf108_init,trace_eval_init,dmi_sysfs_init",
)
"""Skips half a second of self-tests: of ciphers that no guest needs during the boot, and of a random generator for
machines without another one; and 0.1 s for the names of enums in the formats of trace events, and for the firmware's
tables as single files (/sys/firmware/dmi/tables has them)."""

_PARTS = (
    "_recipe.py",
    "_cpio.py",
    "_kernel.py",
    "_bytecode.py",
    "_compile_in_guest.py",
    "_compose.py",
)
_PACKAGE = Path(__file__).parent.parent


def recipe_digest() -> str:
    """Returns a digest of the code that makes an image of packages.

    A version number would be forgotten once, and then two different images would have one name.
    """
    digest = hashlib.sha256()
    for name in _PARTS:
        digest.update(name.encode() + b"\0" + hashlib.sha256((_PACKAGE / "images" / name).read_bytes()).digest())
    return digest.hexdigest()


def guest_sources() -> dict[str, bytes]:
    """Returns our code for the guest, by its path in the folder of Python packages.

    `volant.model` is empty there: what it exports needs libraries that a guest lacks.
    """
    sources = {"volant/model/__init__.py": b""}
    for name in ("__init__.py", "model/agent.py"):
        sources[f"volant/{name}"] = (_PACKAGE / name).read_bytes()
    for path in (_PACKAGE / "guest").glob("*.py"):
        sources[f"volant/guest/{path.name}"] = path.read_bytes()
    return dict(sorted(sources.items()))


def sources_digest(sources: dict[str, bytes]) -> str:
    """Returns the digest of a set of sources."""
    digest = hashlib.sha256()
    for name, data in sorted(sources.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest()


def input_key() -> str:
    """Returns the digest of the inputs that are known without the archive: recipe and guest code.

    They are some fifty files, and each boot asks twice. So they are read again only when one of them has changed.
    """
    return _input_key(_fingerprint())


@lru_cache(maxsize=1)
def _input_key(fingerprint: tuple[object, ...]) -> str:
    del fingerprint
    both = recipe_digest() + sources_digest(guest_sources())
    return hashlib.sha256(both.encode()).hexdigest()


def _fingerprint() -> tuple[object, ...]:
    """Returns a value that differs once one of the inputs has changed."""
    found: list[object] = [_state_of(_PACKAGE / "__init__.py")]
    for folder in ("guest", "images", "model"):
        with os.scandir(_PACKAGE / folder) as entries:
            found += [(entry.name, _state_of(entry)) for entry in entries if entry.name.endswith(".py")]
    return tuple(found)


def _state_of(file: Path | os.DirEntry[str]) -> tuple[int, ...]:
    state = file.stat()
    return state.st_ino, state.st_size, state.st_mtime_ns
