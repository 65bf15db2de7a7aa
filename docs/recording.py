"""Records `examples/demo.py` as an asciicast, and renders that as the animated SVG of the README.

`docs/build.py demo` records anew. The SVG follows from the recording alone, so `docs/build.py --check` compares it. Its
commands and headings are compared with the demo's by `tests/test_docs.py`; times and output are those of one run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from html import escape
from pathlib import Path
from typing import NamedTuple

COLUMNS = 110
ROWS = 26
MAX_PAUSE_S = 1.2
HOLD_S = 4.0
_CHAR_PX, _LINE_PX, _MARGIN_PX, _BAR_PX = 8.43, 19, 14, 30
_LIGHTS = ("#ff5f56", "#ffbd2e", "#27c93f")
_STYLE = """\
text { font: 14px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #d4d4d4; white-space: pre }
.heading { fill: #7fb069; font-weight: bold }
.command { fill: #ffffff; font-weight: bold }
"""


class Line(NamedTuple):
    """One line of the session."""

    at_s: float
    """When it was printed, in seconds from the start."""
    text: str


def record() -> str:
    """Runs the demo and returns it as an asciicast (version 2).

    :raises subprocess.CalledProcessError: when the demo fails.
    """
    command = [sys.executable, "-u", "examples/demo.py"]
    header = {"version": 2, "width": COLUMNS, "height": ROWS, "title": "make demo"}
    parts = [json.dumps(header)]
    began = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=Path(__file__).resolve().parents[1],
        env=os.environ | {"COLUMNS": str(COLUMNS), "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        parts.extend(
            json.dumps([round(time.monotonic() - began, 2), "o", without_folder(line.rstrip()) + "\r\n"])
            for line in process.stdout
        )
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return "\n".join(parts) + "\n"


def without_folder(line: str) -> str:
    """Returns the line with a plain name in the place of the demo's temporary folder."""
    return re.sub(r"/[\w./-]*volant-demo-\w+", "/tmp/demo", line)


def session(cast: str) -> list[Line]:
    """Returns the lines of an asciicast, with pauses of at most `MAX_PAUSE_S`."""
    found: list[Line] = []
    at_s = before_s = 0.0
    for part in cast.splitlines()[1:]:
        printed_s, _, text = json.loads(part)
        at_s += min(printed_s - before_s, MAX_PAUSE_S)
        before_s = printed_s
        found.append(Line(at_s, text.rstrip()))
    return found


def outline(lines: list[str]) -> list[str]:
    """Returns what has to be the same in each run: headings and commands."""
    return [without_folder(line) for line in lines if line.startswith(("# ", "$ "))]


def render(cast: str) -> str:
    """Returns an SVG that plays the asciicast: a window that moves down over all lines."""
    lines = session(cast)
    lasts_s = lines[-1].at_s + HOLD_S
    width, height = round(COLUMNS * _CHAR_PX) + 2 * _MARGIN_PX, ROWS * _LINE_PX + _MARGIN_PX + _BAR_PX
    # The newest line is at the bottom of the window; those that follow are hidden below it.
    moves = {"0.00": 0} | {f"{100 * line.at_s / lasts_s:.2f}": number for number, line in enumerate(lines, 1)}
    moves["100"] = len(lines)
    texts = [
        f'<text y="{number * _LINE_PX}"{_kind(line.text)}>{escape(_cut(line.text))}</text>'
        for number, line in enumerate(lines, 1)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" role="img">',
            "<!-- Written by docs/build.py from docs/demo.cast. -->",
            "<title>A terminal session: make demo</title>",
            f"<style>\n{_STYLE}.session {{ transform: translateY({_shift(len(lines))}px) }}",
            "@media (prefers-reduced-motion: no-preference) {",
            f"  .session {{ animation: down {lasts_s:.1f}s steps(1) infinite }}\n}}",
            "@keyframes down {",
            *(f"{percent}% {{ transform: translateY({_shift(count)}px) }}" for percent, count in moves.items()),
            "}\n</style>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#1e1e1e"/>',
            *(f'<circle cx="{20 + 18 * n}" cy="15" r="5" fill="{fill}"/>' for n, fill in enumerate(_LIGHTS)),
            f'<svg x="{_MARGIN_PX}" y="{_BAR_PX}" width="{width - 2 * _MARGIN_PX}" height="{ROWS * _LINE_PX + 5}">',
            '<g class="session" xml:space="preserve">',
            *texts,
            "</g>\n</svg>\n</svg>\n",
        ]
    )


def _shift(lines: int) -> int:
    """Returns by how much the session is moved when so many of its lines have been printed."""
    return (ROWS - lines) * _LINE_PX


def _cut(text: str) -> str:
    return text if len(text) <= COLUMNS else text[: COLUMNS - 1] + "…"


def _kind(text: str) -> str:
    return ' class="heading"' if text.startswith("# ") else ' class="command"' if text.startswith("$ ") else ""
