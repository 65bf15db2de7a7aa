"""`volar call`."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click
import msgspec
import trio

from volant.client import ActionAnswer

from ._complete import action_names, vm_names
from ._downloads import download
from ._run import FAILED, Failure
from ._streaming import Session, command
from ._text import safe

_PIECE = 64 * 1024
_TEXTS = ("text/", "application/json", "application/xml", "application/x-ndjson", "application/yaml")


@command(None, "call")
@click.argument("vm", shell_complete=vm_names)
@click.argument("action", shell_complete=action_names)
@click.argument("members", metavar="[KEY=TEXT|KEY:=JSON]...", nargs=-1)
@click.option("-d", "--data", metavar="BODY", help="The body as text; @FILE reads a file, @- standard input.")
@click.option("--type", "content_type", metavar="TYPE", help="The body's content type.  [default: application/json]")
@click.option("-o", "--output", metavar="FILE", type=click.Path(dir_okay=False), help="Write the answer to this file.")
async def group(
    session: Session,
    vm: str,
    action: str,
    members: tuple[str, ...],
    data: str | None,
    content_type: str | None,
    output: str | None,
) -> int | None:
    """Call an action of a VM's plugin, and print the answer.

    KEY=TEXT and KEY:=JSON are members of the JSON object to send. `volar plugins get PLUGIN` lists the actions and
    their input. The exit code is 1 if the workload answers with an error.
    """
    if members and data is not None:
        raise click.UsageError("give either --data or members, not both")
    if content_type is not None and data is None:
        raise click.UsageError("--type is for --data")
    body = dict(_member(text) for text in members) or None
    content = None if data is None else _content(data)
    kind = (content_type or "application/json") if data is not None else None
    async with session.client.vms.call_action(vm, action, body, content=content, content_type=kind) as answer:
        if output is not None and answer.is_success:
            # Half an answer would look like a whole one.
            with download(Path(output), 0o666) as file:
                async for piece in answer:
                    file.write(piece)
        else:
            await _write_out(answer)
        if not answer.is_success:
            raise Failure(f"the workload of {vm} answers {action} with the status {answer.status}", code=FAILED)
    return None


def _member(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or key in ("", ":"):
        raise click.UsageError(f"{text!r} is neither KEY=TEXT nor KEY:=JSON")
    if not key.endswith(":"):
        return key, value
    try:
        return key[:-1], msgspec.json.decode(value)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{key[:-1]}: {value[:80]!r} is not valid JSON: {error}") from None


def _content(data: str) -> bytes | FileBody:
    if not data.startswith("@"):
        return data.encode(errors="surrogateescape")
    if data == "@-":
        return FileBody(sys.stdin.fileno())
    try:
        return FileBody(os.open(data[1:], os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise Failure(f"{data[1:]} can't be read: {error.strerror}") from None


class FileBody:
    """A file in pieces, read as fast as the daemon receives them."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        # A terminal or a pipe may never have input: an interrupt must not wait for it.
        piece = await trio.to_thread.run_sync(os.read, self._fd, _PIECE, abandon_on_cancel=True)
        if not piece:
            raise StopAsyncIteration
        return piece


async def _write_out(answer: ActionAnswer) -> None:
    out = sys.stdout.buffer
    if not sys.stdout.isatty():
        async for piece in answer:
            out.write(piece)
            out.flush()
        return
    kind = answer.content_type.partition(";")[0].strip().lower()
    if kind and not kind.startswith(_TEXTS) and not kind.endswith(("+json", "+xml")):
        raise Failure(
            f"the answer is {kind[:80]}, which a terminal can't show", hint="write it to a file with --output FILE"
        )
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    last = ""
    async for piece in answer:
        text = decoder.decode(piece)
        out.write(_shown(text).encode())
        out.flush()
        last = text[-1:] or last
    if last and last != "\n":
        out.write(b"\n")
        out.flush()


def _shown(text: str) -> str:
    """Returns a guest's text with control characters escaped, so that it can't control the terminal."""
    return "\n".join(safe(line) for line in text.split("\n"))
