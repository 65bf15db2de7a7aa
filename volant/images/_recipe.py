"""What an image is made of. Data alone; `_compose` does the work.

The suite is pinned, versions are not: the archive drops a version as soon as its update is out, so a pinned one could
not be fetched a month later. What a build took is recorded in `image.json` instead, and names the image.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SUITE = "trixie"
COMPONENT = "main"
ARCHITECTURE = "amd64"
PYTHON = "python3.13"

KERNEL_METAPACKAGE = "linux-image-cloud-amd64"
"""Depends on the package with the kernel itself, whose name has its version."""

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

BINARIES = {
    "usr/bin/busybox": "busybox-static",
    "usr/bin/python3.13": "python3.13-minimal",
    "usr/lib64/ld-linux-x86-64.so.2": "libc6",
    "usr/lib/x86_64-linux-gnu/libc.so.6": "libc6",
    "usr/lib/x86_64-linux-gnu/libm.so.6": "libc6",
    "usr/lib/x86_64-linux-gnu/libexpat.so.1": "libexpat1",
    "usr/lib/x86_64-linux-gnu/libz.so.1": "zlib1g",
}
"""Files that go into the image as they are, and the package that has them."""

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
"""Besides these, what they depend on."""

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
"""What the image has of Python beside the agent and what that imports: what h2 imports late, and what a small script
may expect. Their imports follow by themselves. No asyncio, no http, no ssl: each would cost megabytes that every boot
has to unpack."""

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
    # Without it Python complains in each start.
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
"""The names under which BusyBox is found. Those that only a machine with people at it needs are left out."""

DEVICES = {
    # The kernel opens the console before anything of ours runs.
    "dev/console": (5, 1, 0o600),
    "dev/null": (1, 3, 0o666),
    # Python wants bytes for its hash seed before /dev is mounted, and the kernel's own pool is not ready then.
    "dev/urandom": (1, 9, 0o666),
}

MIN_MEMORY_MB = 112
"""The least memory with which a guest of this image boots and serves, and has some left: measured with one CPU, 96 is
too little, and 104 leaves 7 MiB."""

KERNEL_PARAMETERS = ("cryptomgr.notests", "initcall_blacklist=jent_mod_init,crypto_kdf108_init")
"""What the kernel's command line should have besides: half a second of self-tests, of ciphers that no guest uses before
it runs, and of a random generator that is for machines without another."""

_PARTS = (
    "_recipe.py",
    "_cpio.py",
    "_kernel.py",
    "_bytecode.py",
    "_compile_in_guest.py",
    "_compose.py",
    "_debs.py",
    "_imports.py",
)


def recipe_digest() -> str:
    """Return a digest of everything that decides how packages become an image: the source of these modules.

    A number that people have to raise would be forgotten once, and two builders would give one name to two images.
    """
    digest = hashlib.sha256()
    folder = Path(__file__).parent
    for name in _PARTS:
        digest.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


def guest_sources() -> dict[str, bytes]:
    """Return the code of ours that runs in a guest, by its path beneath the folder of Python packages.

    `volant.model` is empty there: what it re-exports needs packages that a guest does not have.
    """
    package = Path(__file__).parent.parent
    sources = {"volant/model/__init__.py": b""}
    for name in ("__init__.py", "model/agent.py"):
        sources[f"volant/{name}"] = (package / name).read_bytes()
    for path in (package / "guest").glob("*.py"):
        sources[f"volant/guest/{path.name}"] = path.read_bytes()
    return dict(sorted(sources.items()))


def sources_digest(sources: dict[str, bytes]) -> str:
    """Return the digest of a set of sources."""
    digest = hashlib.sha256()
    for name, data in sorted(sources.items()):
        digest.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
    return digest.hexdigest()


def input_key() -> str:
    """Return the digest of all that an image is made of and that is known without the archive: recipe and guest."""
    both = recipe_digest() + sources_digest(guest_sources())
    return hashlib.sha256(both.encode()).hexdigest()
