"""Builds `docs/reference/volar.md` from the commands themselves, and the reference of the Python API in `docs/site`.

With `--check` nothing is written: the exit code says whether the kept page is what the commands say.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from volant.cli._volar import volar

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "reference" / "volar.md"
MODULES = ["actors", "volant.client", "volant.model", "volant.images"]


def main() -> int:
    """Write or check; return the exit code."""
    text = reference()
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != text:
            print(f"{PAGE} is not what the commands say: run `make docs`", file=sys.stderr)
            return 1
        return 0
    PAGE.write_text(text)
    command = [sys.executable, "-m", "pdoc", "--docformat", "restructuredtext", "-o", str(DOCS / "site"), *MODULES]
    return subprocess.run(command, check=False, cwd=DOCS.parent).returncode


def reference() -> str:
    """The page of all commands."""
    parts = ["# volar", "<!-- Written by docs/build.py. -->"]
    parts.extend(_pages(volar, click.Context(volar, info_name="volar")))
    return "\n\n".join(parts) + "\n"


def _pages(command: click.Command, context: click.Context) -> Iterator[str]:
    if context.parent is not None:
        yield f"{'#' * (context.command_path.count(' ') + 1)} {context.command_path}"
    yield _prose(command.help or "")
    if not isinstance(command, click.Group):
        yield "```\n" + context.command_path + " " + " ".join(command.collect_usage_pieces(context)) + "\n```"
    options = [record for item in command.get_params(context) if (record := item.get_help_record(context))]
    everywhere = _EVERYWHERE if context.parent is not None else {"--help"}
    options = [(names, text) for names, text in options if text and names.split()[0] not in everywhere]
    if options:
        rows = "\n".join(f"| `{_cell(names)}` | {_cell(text)} |" for names, text in options)
        yield f"| option | |\n| --- | --- |\n{rows}"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                yield from _pages(child, click.Context(child, parent=context, info_name=name))


# Every command has these; they stand with `volar` itself.
_EVERYWHERE = {"--api", "--api-key-file", "--json", "--debug", "--help"}


def _prose(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.replace("\b\n", "").strip())
    return "\n\n".join(" ".join(line.strip() for line in paragraph.splitlines()) for paragraph in paragraphs)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


if __name__ == "__main__":
    sys.exit(main())
