"""The manifest of the VM's plugin: for clients of the agent, and in a file for programs in the guest.

The daemon sends it with its first requests, before everything is mounted. So it is kept in memory, and written to its
file at the first request for a command, workload or file, which waits until the guest is set up. Its directories are
created at the same time.
"""

from __future__ import annotations

import sys
import threading

from volant.model import agent

from ._checks import check_directory, check_environment, check_user
from ._http import Problem
from ._process import Setting, make_directory
from ._root import inside
from ._rootfs import replace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ._http import Request
    from ._stream import Stream


class Plugin:
    """The manifest, once the daemon has sent it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._text = b""
        self._known: dict[str, Any] | None = None
        self._written = b""
        self._exec = Setting({}, None, "/", makes_workdir=False)
        self._directories: list[str] = []
        self._secret_env: dict[str, str] = {}
        self.secrets_boot: str | None = None
        """The boot for which the daemon has sent the values of secrets."""

    def take_secrets(self, boot: str, env: dict[str, str]) -> None:
        """Stores the environment variables whose values are secrets, for programs that start from now on."""
        with self._lock:
            self.secrets_boot, self._secret_env = boot, env

    def secret_env(self) -> dict[str, str]:
        """Returns the environment variables whose values are secrets."""
        return self._secret_env

    def serve_put(self, stream: Stream, request: Request) -> None:
        """Answers `PUT /v1/daemon/manifest`. :raises Problem: 400, the body is not a manifest."""
        import json

        text = stream.read_body(request)
        try:
            value = json.loads(text.decode())
        except (ValueError, RecursionError):
            raise Problem(400, "the body is not JSON") from None
        self.take(value, text)
        stream.answer(200, b"{}\n")

    def take(self, value: object, text: bytes) -> None:
        """Stores a manifest.

        :param text: the text for the file
        :raises Problem: 400, the value is not a manifest
        """
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise Problem(400, "that is not a manifest", field="name")
        known = {
            "name": value["name"],
            "version": str(value.get("version", "0")),
            "labels": _object(value.get("labels")),
            "actions": sorted(_object(value.get("actions"))),
        }
        defaults, has_exec = _object(value.get("exec")), isinstance(value.get("exec"), dict)
        # Members of a newer daemon are ignored, as in the rest of a manifest.
        setting = Setting(
            check_environment(defaults.get("env", {}), "exec.env"),
            check_user(defaults.get("user"), "exec.user"),
            check_directory(defaults.get("workdir", "/"), "exec.workdir"),
            makes_workdir=True,
        )
        directories = value.get("directories")
        if not isinstance(directories, list):
            directories = []
        checked = [check_directory(each, "directories") for each in directories]
        with self._lock:
            self._text, self._known, self._exec, self._directories = text, known, setting, checked
            if has_exec:
                setting.secrets = self.secret_env

    def info(self) -> dict[str, object] | None:
        """Returns an `agent_types.PluginInfo`, or None before the manifest has arrived."""
        return self._known

    def exec_defaults(self) -> Setting:
        """Returns the defaults of commands."""
        return self._exec

    def environment(self) -> dict[str, str]:
        """Returns the variable with the file's path; empty if the file was not written."""
        return {agent.MANIFEST_VARIABLE: agent.MANIFEST_FILE} if self._written else {}

    def write(self) -> None:
        """Writes the file and creates the directories, in the workload's root. The guest must be set up."""
        with self._lock:
            text = self._text
            if text == self._written:
                return
            try:
                inside(self._write)
                self._written = text
            except (OSError, Problem) as error:
                # Not an error for programs that do not need it.
                print(f"volant: the manifest can't be written: {error}", file=sys.stderr, flush=True)

    def _write(self) -> None:
        for path in self._directories:
            make_directory(path)
        replace(agent.MANIFEST_FILE, self._text)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
