"""The session that the README shows is that of the demo as it is now."""

from __future__ import annotations

import os
import runpy
from contextlib import ExitStack

import pytest

from examples import demo
from tests.docs.pages import REPOSITORY

# A script's module, beside which `tests.docs` stands in for the package `docs`.
RECORDING = runpy.run_path(str(REPOSITORY / "docs/recording.py"))
OUTLINE, SESSION = RECORDING["outline"], RECORDING["session"]


def test_the_recorded_session_is_that_of_the_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Process:
        """A command of the demo that prints what the demo waits for, and is done."""

        returncode = 0

        def __init__(self, words: list[object], **_: object) -> None:
            reader, writer = os.pipe()
            os.write(writer, b"volantd: listening on http://127.0.0.1:1\nlocalhost/debian:13\nhello from the guest\n")
            os.close(writer)
            self.stdout = os.fdopen(reader, "rb")

        def __enter__(self) -> Process:
            return self

        def __exit__(self, *_: object) -> None:
            self.stdout.close()

        def wait(self, timeout: float | None = None) -> int:
            return 0

        def terminate(self) -> None: ...

        def send_signal(self, signum: int) -> None: ...

    monkeypatch.setenv("VOLANT_API_BASE", "")
    monkeypatch.setattr("subprocess.Popen", Process)
    monkeypatch.setattr(demo, "_ignore_signals", lambda: None)
    with ExitStack() as stack:
        demo.show(stack)
    shown = OUTLINE(capsys.readouterr().out.splitlines())
    cast = (REPOSITORY / "docs/demo.cast").read_text()
    assert OUTLINE([line.text for line in SESSION(cast)]) == shown
