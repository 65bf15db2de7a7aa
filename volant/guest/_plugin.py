"""What kind of VM this is: the manifest of its plugin, for whoever asks the agent and for what runs in the guest.

It comes with the daemon's first requests, when not all is mounted yet. So it is kept in memory, and put into its file
when the first command, workload or file is asked for, which waits until the guest is set up.
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

    from ._http import Request, Stream


class Plugin:
    """The manifest, once there is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._text = b""
        self._known: dict[str, Any] | None = None
        self._written = b""

    def serve_put(self, stream: Stream, request: Request) -> None:
        """Answer `PUT /v1/daemon/manifest`; :raises Problem: 400, that is none."""
        import json

        text = stream.read_body(request)
        try:
            value = json.loads(text.decode())
        except (ValueError, RecursionError):
            raise Problem(400, "the body is no JSON") from None
        self.take(value, text)
        stream.answer(200, b"{}\n")

    def take(self, value: object, text: bytes) -> None:
        """Know it from now on; `text` is how it is written. :raises Problem: 400, that is none."""
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise Problem(400, "that is no manifest", field="name")
        known = {
            "name": value["name"],
            "version": str(value.get("version", "0")),
            "labels": _object(value.get("labels")),
            "actions": sorted(_object(value.get("actions"))),
        }
        with self._lock:
            self._text, self._known = text, known

    def info(self) -> dict[str, object] | None:
        """Return a `agent_types.PluginInfo`, or None while it is not known."""
        return self._known

    def environment(self) -> dict[str, str]:
        """Return what tells a workload where the manifest is: nothing, if there is none or it could not be written."""
        return {agent.MANIFEST_VARIABLE: agent.MANIFEST_FILE} if self._written else {}

    def write(self) -> None:
        """Put it into its file, in the root in which things act. The guest must be set up."""
        with self._lock:
            text = self._text
            if text == self._written:
                return
            try:
                inside(lambda: replace(agent.MANIFEST_FILE, text))
                self._written = text
            except (OSError, Problem) as error:
                # What does without it is not to suffer from that.
                print(f"volant: the manifest can't be written: {error}", file=sys.stderr, flush=True)


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
