"""`volar debug bundle`: writes answers of the API to one file for a bug report."""

from __future__ import annotations

import io
import json
import os
import tarfile
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import click
import msgspec
import trio

from volant.client import Client, ClientError
from volant.model import Problem, StreamGap

from ._lazy_group import LazyGroup
from ._run import CONFLICT, Failure
from ._streaming import Session, command

_ANSWER_S = 15.0
_EVENTS = 1000
_EVENTS_S = 5.0
_INSPECTED = 50
"""Maximum number of VMs whose `inspect` is included: first VMs with a reason, then stopped ones."""


@click.group(name="debug", cls=LazyGroup)
def group() -> None:
    """Collect information for a bug report."""


@command(group, "bundle")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="The file.  [default: volant-debug-<time>.tar.gz in the current directory]",
)
async def bundle(session: Session, output: Path | None) -> None:
    """Write one file for a bug report: the daemon's answers about itself, its VMs, events and tasks.

    It contains names, labels, paths and addresses, but no keys, secrets, environments of workloads or output of guests.
    Check it before you share it, and add the daemon's log.
    """
    name = f"volant-debug-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    path = output if output is not None else Path(f"{name}.tar.gz")
    members, missing = await _gather(session.client)
    _write(path, _archive(name, members))
    for what, why in missing.items():
        session.out.note(f"missing: {what}: {why}")
    session.out.note("check it before you share it")
    session.out.result({"path": str(path), "members": list(members), "missing": missing}, str(path))


async def _gather(client: Client) -> tuple[dict[str, bytes], dict[str, str]]:
    """Returns the answers by file name, and why others are missing. :raises ClientError: the daemon does not answer."""
    members = {"healthz.json": _json(await client.healthz())}
    missing: dict[str, str] = {}

    async def add(name: str, ask: Callable[[], Awaitable[object]]) -> None:
        try:
            with trio.fail_after(_ANSWER_S):
                answer = await ask()
            members[name] = answer.encode() if isinstance(answer, str) else _json(answer)
        except trio.TooSlowError:
            missing[name] = f"it took more than {_ANSWER_S:g} s"
        except (ClientError, Problem) as error:
            missing[name] = str(error)

    await add("info.json", client.system.info)
    await add("status.json", client.system.status)
    await add("tree.json", client.system.tree)
    await add("tasks.txt", client.system.tasks)
    await add("metrics.txt", client.system.metrics)
    await add("orphans.json", client.system.orphans)
    await add("plugins.json", client.plugins.list)
    await add("events.json", partial(_events, client))
    await add("vms.json", client.vms.list)
    if "vms.json" in members:
        vms = sorted(await client.vms.list(), key=lambda vm: (vm.reason is None, vm.status == "running", vm.id))
        for vm in vms[:_INSPECTED]:
            await add(f"inspect/{vm.name}.json", partial(client.vms.inspect, vm.name))
    return members, missing


async def _events(client: Client) -> list[object]:
    """Returns the newest events."""
    newest = await client.newest_event()
    epoch, _, number = newest.rpartition("-")
    # An event's number is no contract with clients; `volar` comes with its daemon.
    before = f"{epoch}-{max(0, int(number) - _EVENTS)}" if number.isdecimal() else "0"
    events: list[object] = []
    async with client.events(after=before) as feed:
        with trio.move_on_after(_EVENTS_S):
            while before != newest and len(events) < _EVENTS:
                event = await feed.receive()
                events.append(event)
                before = event.oldest if isinstance(event, StreamGap) else event.id
    return events


def _json(answer: object) -> bytes:
    plain = msgspec.to_builtins(answer, str_keys=True)
    return (json.dumps(plain, indent=2, ensure_ascii=False) + "\n").encode(errors="replace")


def _archive(prefix: str, members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(f"{prefix}/{name}")
            info.size, info.mode, info.mtime = len(data), 0o600, int(time.time())
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _write(path: Path, data: bytes) -> None:
    """Writes a new file that only its owner can read. :raises Failure: it exists, or can't be written."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise Failure(f"{path} exists already", code=CONFLICT, hint="name another file with --output") from None
    except OSError as error:
        raise Failure(f"{path} can't be written: {error.strerror}") from error
    with os.fdopen(fd, "wb") as file:
        file.write(data)
