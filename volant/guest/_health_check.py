"""The health check of a workload: an HTTP request or a command."""

from __future__ import annotations

import time

from ._checks import check_number, check_object, check_port, check_strings
from ._http import Problem
from ._process import Setting, SpawnError, kill_group, spawn

_FIELDS = {"path", "port", "command", "interval_s", "timeout_s", "retries", "start_period_s"}
_NAME = "health_check"


class HealthCheck:
    """A checked `agent_types.HealthCheck`."""

    def __init__(self, value: object, port: int | None, setting: Setting) -> None:
        """
        :param port: the workload's HTTP port; the default for a check by path
        :param setting: for a check by command
        :raises Problem: 400, a field is wrong
        """
        self._setting = setting
        fields = check_object(value, _FIELDS, _NAME, f"{_NAME}.")
        path = fields.get("path")
        self.command = check_strings(fields.get("command", []), f"{_NAME}.command", empty=True)
        if (path is None) == (not self.command):
            raise Problem(400, f"{_NAME} needs either a path or a command", field=_NAME)
        if path is not None:
            if not isinstance(path, str) or not path.startswith("/") or not path.isascii() or not path.isprintable():
                raise Problem(400, f"{_NAME}.path is not a path", field=f"{_NAME}.path")
            if " " in path:
                raise Problem(400, f"{_NAME}.path has a space", field=f"{_NAME}.path")
        self.path: str | None = path
        self.port = check_port(fields.get("port"), f"{_NAME}.port") or port
        if path is not None and self.port is None:
            raise Problem(400, f"{_NAME} by path needs a port", field=f"{_NAME}.port")
        self.interval_s = check_number(fields.get("interval_s", 5.0), f"{_NAME}.interval_s", 0.1, 3600)
        self.timeout_s = check_number(fields.get("timeout_s", 2.0), f"{_NAME}.timeout_s", 0.1, 600)
        self.retries = int(check_number(fields.get("retries", 3), f"{_NAME}.retries", 1, 100))
        start_s = check_number(fields.get("start_period_s", 0.0), f"{_NAME}.start_period_s", 0, 3600)
        self.starts_within_s = start_s + self.interval_s * self.retries
        """How long failures before the first success are ignored."""

    def run(self) -> str:
        """Runs the check; returns why it failed, or an empty text."""
        return self._run_command() if self.command else self._ask()

    def _run_command(self) -> str:
        import subprocess

        null = subprocess.DEVNULL
        try:
            process = spawn(self.command, self._setting, null, null, null)
        except SpawnError as error:
            return str(error)
        try:
            code = process.wait(self.timeout_s)
        except subprocess.TimeoutExpired:
            kill_group(process)
            process.wait()
            return f"the check did not end within {self.timeout_s:g} s"
        return "" if code == 0 else f"the check ended with {code}"

    def _ask(self) -> str:
        import socket

        end = time.monotonic() + self.timeout_s
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
                sock.settimeout(self.timeout_s)
                sock.connect(("127.0.0.1", self.port))
                head = f"GET {self.path} HTTP/1.1\r\nHost: localhost:{self.port}\r\nConnection: close\r\n\r\n"
                sock.sendall(head.encode())
                data = b""
                while b"\r\n" not in data and len(data) < 4096:
                    sock.settimeout(max(0.001, end - time.monotonic()))
                    piece = sock.recv(4096)
                    if not piece:
                        break
                    data += piece
        except TimeoutError:
            return f"no answer within {self.timeout_s:g} s"
        except OSError as error:
            return f"no answer: {error.strerror}"
        words = data.split(b"\r\n", 1)[0].split(b" ")
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            return "the answer is not HTTP"
        status = int(words[1])
        return "" if 200 <= status < 400 else f"the answer has the status {status}"
