"""The manifest of the VM's plugin: for clients of the agent, and in a file for programs in the guest.

The daemon sends it with its first requests, before everything is mounted. So it is kept in memory, and written to its
file at the first request for a command, workload or file, which waits until the guest is set up.
"""

from __future__ import annotations

import sys
import threading

from volant.model import agent

from ._http import Problem
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

        :param text: what to write to the file
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
        with self._lock:
            self._text, self._known = text, known

    def info(self) -> dict[str, object] | None:
        """Returns an `agent_types.PluginInfo`, or None before the manifest has come."""
        return self._known

    def environment(self) -> dict[str, str]:
        """Returns the variable with the file's path; nothing if the file was not written."""
        return {agent.MANIFEST_VARIABLE: agent.MANIFEST_FILE} if self._written else {}

    def write(self) -> None:
        """Writes the file, in the workload's root. The guest must be set up."""
        with self._lock:
            text = self._text
            if text == self._written:
                return
            try:
                inside(lambda: replace(agent.MANIFEST_FILE, text))
                self._written = text
            except (OSError, Problem) as error:
                # Not an error for programs that do not need it.
                print(f"volant: the manifest can't be written: {error}", file=sys.stderr, flush=True)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
