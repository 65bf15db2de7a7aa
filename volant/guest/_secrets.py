"""`/v1/daemon/secrets`: receives the values of the VM's secrets, and makes them available to programs.

Files are created with the VM's root as `/` (`_root.inside`), and only in memory: a value must not be written to a disk,
where a link, a volume or an image's own `/run` could lead. No text that this module returns or raises contains a part
of a value.
"""

# ruff: noqa: PTH103, PTH123 - importing pathlib would cost every boot a good part of a second

from __future__ import annotations

import os
import threading

from . import _root
from ._checks import check_base64, check_directory, check_environment, check_object, check_user, decode_json
from ._http import Problem

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ._http import Request
    from ._plugin import Plugin
    from ._stream import Stream

_FIELDS = {"boot", "env", "files", "user"}
_MOST = 64
_MAX_BOOT = 128

_lock = threading.Lock()


def serve(stream: Stream, request: Request, plugin: Plugin) -> None:
    """Answers `GET`, with the boot of the present values, and `PUT`.

    :raises Problem: 400, malformed; 409, a file can't be made
    """
    import json

    if request.method == "PUT":
        value = decode_json(stream.read_body(request), _FIELDS)
        boot = value.get("boot")
        if not isinstance(boot, str) or not 0 < len(boot) <= _MAX_BOOT:
            raise Problem(400, "boot is not a text", field="boot")
        env = _env_of(value.get("env", {}))
        files = _files_of(value.get("files", []))
        user = check_user(value.get("user"), "user")
        with _lock:
            _write_all(files, user)
            plugin.take_secrets(boot, env)
    stream.answer(200, json.dumps({"boot": plugin.secrets_boot}).encode() + b"\n")


def _env_of(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > _MOST:
        raise Problem(400, f"env is not an object of at most {_MOST} texts", field="env")
    try:
        # An environment is bytes, as the values of secrets.
        return check_environment({name: os.fsdecode(check_base64(data, "env")) for name, data in value.items()}, "env")
    except ValueError:
        raise Problem(400, "env has a value that can't be set", field="env") from None


def _files_of(value: object) -> list[tuple[str, bytes]]:
    if not isinstance(value, list) or len(value) > _MOST:
        raise Problem(400, f"files is not a list of at most {_MOST} objects", field="files")
    found = []
    for number, each in enumerate(value):
        prefix = f"files[{number}]."
        file = check_object(each, {"path", "data"}, prefix.removesuffix("."), prefix)
        path = check_directory(file.get("path"), f"{prefix}path")
        found.append((path, check_base64(file.get("data"), f"{prefix}data")))
    return found


def _write_all(files: list[tuple[str, bytes]], user: str | None) -> None:
    owner = (0, 0)
    if user is not None and files:
        try:
            identity = _root.identity(user)
        except _root.NoSuchUser:
            raise Problem(409, f"the image has no user {user} to own the files of secrets") from None
        owner = (identity["user"], identity["group"])
    in_memory = _file_systems_in_memory()
    for path, data in files:

        def write(path: str = path, data: bytes = data) -> None:
            _write(path, data, owner, in_memory)

        try:
            _root.inside(write)
        except OSError as error:
            raise Problem(409, f"{path} can't be made: {error.strerror}", field="files") from None


def _write(path: str, data: bytes, owner: tuple[int, int], in_memory: set[int]) -> None:
    """Writes a file atomically. :raises OSError: the system refuses, or the file would be on a disk."""
    directory, name = os.path.split(path)
    os.makedirs(directory, 0o755, exist_ok=True)
    # From here on, whatever the path leads to.
    there = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if os.fstat(there).st_dev not in in_memory:
            raise OSError(0, "its directory is not in memory, but on a disk")
        # No file of the VM has this name, and it is short enough whatever `name` is.
        fresh = f".volant-{os.urandom(16).hex()}"
        fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o400, dir_fd=there)
        try:
            os.fchown(fd, *owner)
            while data:
                data = data[os.write(fd, data) :]
            os.rename(fresh, name, src_dir_fd=there, dst_dir_fd=there)
        except BaseException:
            os.unlink(fresh, dir_fd=there)
            raise
        finally:
            os.close(fd)
    finally:
        os.close(there)


def _file_systems_in_memory() -> set[int]:
    """Returns the device numbers of all mounted tmpfs."""
    found = set()
    with open("/proc/self/mountinfo", errors="surrogateescape") as handle:
        for line in handle:
            before, _, after = line.partition(" - ")
            if after.startswith("tmpfs "):
                major, _, minor = before.split()[2].partition(":")
                found.add(os.makedev(int(major), int(minor)))
    return found
