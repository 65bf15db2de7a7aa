"""Finds the command blocks of the documentation, and the comments that say how a test runs them.

A command block is fenced as `sh` or `console`, or begins with a command and is indented or fenced without a language.
A block that begins with `# NAME.EXT` is a file, which the test writes. Comments before a block:

- `<!-- not run: REASON -->`: it can't run here, or another test runs it
- `<!-- page not run: REASON -->`: likewise, all of the page
- `<!-- before: COMMANDS -->`: commands that prepare what the reader already has
- `<!-- exits: CODE -->`: a command of the block is expected to fail with this exit code
- `<!-- until interrupted -->`: the command does not end by itself
- `<!-- example output -->`: the output was printed on another host
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").rglob("*.md"))]
_RUN = ("sh", "console")
_MAYBE = ("", "indented")
_FILES = ("python", "toml")
_COMMANDS = (
    *("apt-get", "claude", "curl", "echo", "export", "install", "kill", "make", "minicom", "mke2fs", "mmdebstrap"),
    *("openssl", "pg_dump", "podman", "python", "python3", "sha256sum", "socat", "sudo", "systemctl", "tar", "volantd"),
    *("volar", "websocat", "mysqldump"),
)
_COMMAND = re.compile(rf"(?:\$ |(?:[A-Z_]+=\S+ )*(?:{'|'.join(_COMMANDS)})(?: (?! )|\Z))")
_FILE = re.compile(r"# ((?:/[a-z/]+/)?[a-z_]+\.[a-z]+)\Z")
_COMMENT = re.compile(
    r"<!--\s*(page not run|not run|before|exits|until interrupted|example output)(?::\s*(.*?))?\s*-->", re.DOTALL
)


@dataclass
class Block:
    """One block of a page."""

    line: int
    text: str
    console: bool
    """Whether commands begin with `$ ` and output stands between them."""
    file: str | None = None
    """The file that the block is the content of; None: it is commands."""
    words: dict[str, str] = field(default_factory=dict)
    """The comments before it, by their first words."""

    def commands(self) -> list[tuple[str, str]]:
        """Returns the commands, each with the output printed below it."""
        if not self.console:
            return [(self.text, "")]
        found: list[tuple[str, str]] = []
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            lines = part.splitlines()
            count = 1
            while lines[count - 1].endswith("\\"):
                count += 1
            found.append(("\n".join(lines[:count]), "\n".join(lines[count:])))
        return found


def blocks(page: Path) -> list[Block]:
    """Returns the command blocks and files of a page, in order."""
    found: list[Block] = []
    words: dict[str, str] = {}
    whole: dict[str, str] = {}
    for kind, line, text in parts(page.read_text()):
        if kind == "comment":
            if comment := _COMMENT.fullmatch(text.strip()):
                if comment[1] == "page not run":
                    whole = {"not run": comment[2] or ""}
                else:
                    words[comment[1]] = comment[2] or ""
            continue
        if kind != "text":
            first = text.partition("\n")[0]
            file = _FILE.match(first) if kind in (*_MAYBE, *_FILES) else None
            if file or kind in _RUN or (kind in _MAYBE and _COMMAND.match(first)):
                console = kind == "console" or first.startswith("$ ")
                found.append(Block(line, text, console, file[1] if file else None, {**whole, **words}))
        words = {}
    return found


def parts(text: str) -> Iterator[tuple[str, int, str]]:
    """Yields the kind, the line and the text of each block of a page, of each comment and of each line of text."""
    lines = text.splitlines()
    at = 0
    while at < len(lines):
        start, line = at, lines[at]
        at += 1
        if fence := re.match(r"```(\w*)", line):
            while lines[at] != "```":
                at += 1
            yield fence[1], start + 1, "\n".join(lines[start + 1 : at])
            at += 1
        elif line.startswith("<!--"):
            while "-->" not in lines[at - 1]:
                at += 1
            yield "comment", start + 1, "\n".join(lines[start:at])
        elif line.startswith("    ") and (start == 0 or not lines[start - 1].strip() or "-->" in lines[start - 1]):
            while at < len(lines) and (lines[at].startswith("    ") or not lines[at].strip()):
                at += 1
            yield "indented", start + 1, "\n".join(each[4:] for each in lines[start:at]).rstrip()
        elif line.strip():
            yield "text", start + 1, line
