"""Builds what the code says of itself: `docs/reference/volar.md` from the commands, `docs/api/openapi.yaml` from the
routes, and the reference of the Python API in `docs/site`, which is not kept.

With `--check` nothing is written: the exit code says whether the kept files are what the code says.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import yaml

from volant.api._openapi import document
from volant.cli._volar import volar

DOCS = Path(__file__).resolve().parent
MODULES = ["actors", "actors.testing", "volant.client", "volant.model", "volant.images"]


def main() -> int:
    """Write or check; return the exit code."""
    kept = {DOCS / "reference" / "volar.md": reference(), DOCS / "api" / "openapi.yaml": openapi()}
    if "--check" in sys.argv[1:]:
        stale = [path for path, text in kept.items() if not path.is_file() or path.read_text() != text]
        for path in stale:
            print(f"{path} is not what the code says: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for path, text in kept.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    command = [sys.executable, "-m", "pdoc", "--docformat", "restructuredtext", "-o", str(DOCS / "site"), *MODULES]
    return subprocess.run(command, check=False, cwd=DOCS.parent).returncode


def openapi() -> str:
    """The OpenAPI document."""
    text = yaml.safe_dump(document(), sort_keys=False, width=110, allow_unicode=True)
    return f"# Written by docs/build.py from volant/api/_operations.py.\n{text}"


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
