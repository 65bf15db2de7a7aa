"""Commands that ask and print start fast: they import neither Trio nor httpx."""

from __future__ import annotations

import os
import pty
import re
import sys

import click
import pytest
import trio

from tests.client.kit import answer, serving, vm
from volant.cli import _plugins, _system, _vms_group
from volant.cli._lazy_group import LazyGroup
from volant.cli._volar import volar as root

from .kit import ENVIRONMENT, ROOT
from .test_completion import completing

LARGE = {"trio", "httpx", "ssl", "asyncio", "rich", "volant.concurrency", "volant.images"}
PROGRAM = """
import sys
from volant.cli.main import run
try:
    code = run(sys.argv[1:])
except SystemExit as done:
    code = done.code
print(*sys.modules, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.programs
@pytest.mark.parametrize(
    ("words", "environ"),
    [
        (["--help"], {}),
        (["--version"], {}),
        (["vms", "--help"], {}),
        (["vms", "list", "--help"], {}),
        (["vms", "list"], {}),
        (["vms", "get", "demo", "--json"], {}),
        (["vms", "start", "demo"], {}),
        (["ps", "-a"], {}),
        (["inspect", "demo"], {}),
        (["top", "--once"], {}),
        (["images"], {}),
        (["volumes", "-q"], {}),
        (["vms", "create", "demo"], {}),
        (["rm", "-f", "demo"], {}),
        (["vms", "delete", "demo"], {}),
        (["plugins", "list"], {}),
        (["system", "df", "--json"], {}),
        ([], completing("vms", "")),
        ([], completing("vms", "get", "d")),
    ],
)
async def test_a_command_that_asks_and_prints_imports_no_large_library(
    words: list[str], environ: dict[str, str]
) -> None:
    async with serving() as server:
        server.routes = {
            "GET /api/v1/vms": answer([vm()]),
            "GET /api/v1/vms/demo": answer(vm()),
            "POST /api/v1/vms/demo/start": answer(vm()),
            "DELETE /api/v1/vms/demo": answer(None, 204),
            "GET /api/v1/plugins": answer([]),
            "GET /api/v1/stats/vms": answer([]),
            "GET /api/v1/images": answer([]),
            "GET /api/v1/volumes": answer([]),
            "POST /api/v1/vms": answer(vm(), 201),
            "GET /api/v1/system/df": answer(
                {"items": [], "total_bytes": 0, "reclaimable_bytes": 0, "state_free_bytes": 0, "cache_free_bytes": 0}
            ),
        }
        with trio.fail_after(20):
            done = await trio.run_process(
                [sys.executable, "-c", PROGRAM, *words], capture_stdout=True, capture_stderr=True, check=False,
                env=ENVIRONMENT | {"VOLANT_API_BASE": server.base_url} | environ, cwd=ROOT,
            )  # fmt: skip
    imported = set(done.stderr.decode().split())
    assert done.returncode == 0, done.stderr.decode()
    assert "volant.cli" in imported
    assert not imported & LARGE


@pytest.mark.parametrize(("columns", "imports_rich"), [(120, False), (40, True)])
async def test_a_table_that_fits_into_the_terminal_needs_no_library(columns: int, imports_rich: bool) -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer([vm(status="crashed"), vm(name="longer", status="paused")])
        master, slave = pty.openpty()
        try:
            done = await trio.run_process(
                [sys.executable, "-c", PROGRAM, "vms", "list"], stdout=slave, capture_stderr=True, cwd=ROOT,
                env=ENVIRONMENT | {"VOLANT_API_BASE": server.base_url, "TERM": "xterm", "COLUMNS": str(columns)},
            )  # fmt: skip
            text = os.read(master, 65536).decode()
        finally:
            os.close(slave)
            os.close(master)
    assert ("rich" in done.stderr.decode().split()) == imports_rich
    assert "\x1b[31m" in text
    if not imports_rich:
        lines = [re.sub(r"\x1b\[\d*m", "", line) for line in text.splitlines()]
        assert lines[0].startswith("NAME    STATUS   PLUGIN")
        assert lines[1].startswith("demo    crashed  base  ")
        assert lines[2].startswith("longer  paused   base  ")
        assert text.startswith("\x1b[1mNAME\x1b[0m    \x1b[1mSTATUS")


@pytest.mark.parametrize("group", [root, _vms_group.group, _system.group, _plugins.group])
def test_a_command_that_is_not_imported_yet_is_listed_as_it_will_be(group: LazyGroup) -> None:
    context = click.Context(group)
    for name, lazy in group.lazy.items():
        command = group.get_command(context, name)
        assert command is not None
        assert command.name == name
        assert click.Command(name, help=lazy.text).get_short_help_str(1000) == command.get_short_help_str(1000)
        assert name not in group.commands
