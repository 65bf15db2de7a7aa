"""The output of commands: JSON for programs, tables and colours for people, plain columns for pipes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TextIO

import click
import msgspec

from ._text import safe

_STATUS_COLOURS = {
    "running": "green",
    "ok": "green",
    "pending": "yellow",
    "starting": "yellow",
    "stopping": "yellow",
    "deleting": "yellow",
    "paused": "cyan",
    "crashed": "red",
    "failed": "red",
    "degraded": "red",
}


def colourful(stream: TextIO) -> bool:
    """Returns whether `stream` is a terminal on which colours are wanted."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, colour: str | None, stream: TextIO, **more: bool) -> str:
    """Returns `text` in `colour`, if `stream` shows colours."""
    return click.style(text, fg=colour, **more) if colourful(stream) else text


def as_json(value: object, *, is_sorted: bool = False) -> bytes:
    """Returns `value` as JSON. The name of a file may be any bytes; those that are not UTF-8 are escaped surrogates, as
    Python's `json` reads them."""
    try:
        return msgspec.json.encode(value, order="sorted" if is_sorted else None)
    except UnicodeEncodeError:
        import json

        plain = json.dumps(msgspec.to_builtins(value, str_keys=True), ensure_ascii=False, sort_keys=is_sorted)
        return plain.encode(errors="backslashreplace")


class Output:
    """One command's output."""

    def __init__(self, json: bool, names: bool = False) -> None:
        self.json = json
        self.names = names

    def document(self, value: object) -> None:
        """Prints the JSON document of a command."""
        self._write(msgspec.json.format(as_json(value, is_sorted=isinstance(value, dict))) + b"\n")

    def item(self, value: object) -> None:
        """Prints one line of a stream of JSON documents."""
        self._write(as_json(value) + b"\n")

    def line(self, text: str) -> None:
        """Prints one line for people, which must be safe already."""
        self._write(text.encode(errors="replace") + b"\n")

    def raw(self, stream: str, data: bytes) -> None:
        """Prints bytes as they are, to standard output or standard error."""
        target = sys.stdout if stream == "stdout" else sys.stderr
        target.buffer.write(data)
        target.buffer.flush()

    def note(self, text: str) -> None:
        """Prints a message for people to standard error; nothing with --json."""
        if not self.json:
            sys.stderr.write(safe(text) + "\n")
            sys.stderr.flush()

    def status(self, text: str) -> str:
        """Returns a status in its colour."""
        return styled(safe(text), _STATUS_COLOURS.get(text), sys.stdout)

    def result(self, value: object, text: str) -> None:
        """Prints the result of a command: the document, or a line for people, which must be safe already."""
        if self.json:
            self.document(value)
        else:
            self.line(text)

    def listing(
        self, value: object, titles: Sequence[str], rows: Iterable[Sequence[object]], *, status_column: int = -1
    ) -> None:
        """Prints a list: the document, a table, or only its first column."""
        if self.json:
            self.document(value)
        elif self.names:
            for row in rows:
                self.line(safe(row[0]))
        else:
            self.table(titles, list(rows), status_column=status_column)

    def facts(self, value: object, pairs: Sequence[tuple[str, object]]) -> None:
        """Prints the properties of an object: the document, or names and values."""
        if self.json:
            self.document(value)
        else:
            self.fields(pairs)

    def table(self, titles: Sequence[str], rows: Sequence[Sequence[object]], *, status_column: int = -1) -> None:
        """Prints columns under titles; in a pipe, cells are not wrapped."""
        cells = [["" if cell is None else safe(_plain(cell)) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(titles, *cells, strict=True)]
        if sys.stdout.isatty() and not _fits(cells, widths):
            self._folded(titles, cells, status_column)
            return
        styles = [[styled(title, None, sys.stdout, bold=True) for title in titles]]
        for line in cells:
            is_status = (i == status_column and cell in _STATUS_COLOURS for i, cell in enumerate(line))
            styles.append([self.status(cell) if yes else cell for cell, yes in zip(line, is_status, strict=True)])
        for plain, shown in zip([titles, *cells], styles, strict=True):
            spaces = (" " * (width - len(cell)) for cell, width in zip(plain, widths, strict=True))
            self.line("  ".join(map("".join, zip(shown, spaces, strict=True))).rstrip())

    def _folded(self, titles: Sequence[str], cells: Sequence[Sequence[str]], status_column: int) -> None:
        """Prints a table that is wider than the terminal."""
        # It takes as long to import as a request takes.
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in titles:
            table.add_column(Text(title), overflow="fold")
        for line in cells:
            texts = [
                Text(cell, style=_STATUS_COLOURS.get(cell, "") if i == status_column else "")
                for i, cell in enumerate(line)
            ]
            table.add_row(*texts)
        Console().print(table)

    def fields(self, pairs: Sequence[tuple[str, object]]) -> None:
        """Prints names and values, one per line; leaves out names without a value."""
        shown = [(name, value) for name, value in pairs if value not in (None, "", {}, [], ())]
        width = max((len(name) for name, _ in shown), default=0)
        for name, value in shown:
            text = self.status(str(value)) if name in ("status", "desired") else safe(_plain(value))
            self.line(f"{styled((name + ':').ljust(width + 1), None, sys.stdout, bold=True)} {text}")

    def nested(self, value: Any, indent: int = 0) -> None:
        """Prints any JSON, indented for people."""
        pad = "  " * indent
        pairs = value.items() if isinstance(value, Mapping) else (("-", item) for item in value)
        for name, member in pairs:
            label = "-" if name == "-" else f"{safe(name)}:"
            if isinstance(member, Mapping | list) and member:
                self.line(f"{pad}{label}")
                self.nested(member, indent + 1)
            elif member not in (None, "", [], {}):
                self.line(f"{pad}{label} {safe(_plain(member))}")

    def _write(self, data: bytes) -> None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def _fits(cells: Sequence[Sequence[str]], widths: Sequence[int]) -> bool:
    """Returns whether a table fits into the terminal, with one column for each character."""
    import shutil

    is_simple = all(cell.isascii() and cell.isprintable() for line in cells for cell in line)
    return is_simple and sum(widths) + 2 * (len(widths) - 1) <= shutil.get_terminal_size().columns


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={member}" for key, member in value.items())
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value
