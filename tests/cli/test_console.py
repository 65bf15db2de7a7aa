"""`volar vms console` at a real terminal: every key goes to the guest but one, and the terminal is given back."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import trio

from tests.api.test_console import Desk, at_desk
from tests.cli.kit import ENVIRONMENT, ROOT, Terminal, at_terminal, command


def terminal(desk: Desk, *words: str) -> AbstractAsyncContextManager[Terminal]:
    return at_terminal(f"http://127.0.0.1:{desk.api.server.port}", "vms", "console", *words)


async def test_keys_reach_the_guest_and_one_leaves(tmp_path: Path) -> None:
    async with at_desk(tmp_path) as desk:
        desk.say(b"before\r\n# ")
        async with terminal(desk, "demo") as at:
            await at.expect(rb"Ctrl-\] leaves")
            await at.expect(rb"before\r\n# ")
            assert not at.is_as_before()
            at.type(b"ls\r\x03\x04\x1a\t\xff")
            assert await desk.heard(8) == b"ls\r\x03\x04\x1a\t\xff"
            desk.say(b"\x1b[1mbold\x00")
            await at.expect(rb"\x1b\[1mbold\x00")
            at.type(b"x\x1dnever typed")
            assert await at.end() == 0
            assert at.is_as_before()
            assert await desk.heard(1) == b"x"
            assert os.read(desk.input, 100) == b""


async def test_the_terminal_is_restored_on_a_signal_and_when_the_vm_ends(tmp_path: Path) -> None:
    async with at_desk(tmp_path) as desk:
        async with terminal(desk, "demo", "--read-only") as at:
            await at.expect(rb"leaves")
            at.type(b"dropped")
            desk.say(b"said")
            await at.expect(rb"said")
            at.process.send_signal(signal.SIGTERM)
            assert await at.end() == 128 + signal.SIGTERM
            assert at.is_as_before()
        assert os.read(desk.input, 100) == b""
        async with terminal(desk, "demo", "--escape", "none") as at:
            await at.expect(rb"no key leaves")
            at.type(b"\x1d")
            assert await desk.heard(1) == b"\x1d"
            desk.shut.cancel()
            await at.expect(rb"volar: the VM is crashed")
            assert await at.end() == 0
            assert at.is_as_before()


async def test_a_second_keyboard_is_a_conflict_unless_it_is_taken(tmp_path: Path) -> None:
    async with at_desk(tmp_path) as desk:
        async with terminal(desk, "demo") as first:
            await first.expect(rb"leaves")
            async with terminal(desk, "demo") as second:
                await second.expect(rb"another client types")
                assert await second.end() == 4
            async with terminal(desk, "demo", "--take") as third:
                await third.expect(rb"leaves")
                await first.expect(rb"another client has taken the keyboard")
                assert await first.end() == 4
                assert first.is_as_before()


async def test_what_is_piped_in_is_typed(tmp_path: Path) -> None:
    async with at_desk(tmp_path) as desk:
        environ = ENVIRONMENT | {"VOLANT_API_BASE": f"http://127.0.0.1:{desk.api.server.port}"}
        async with trio.open_nursery() as nursery:
            run = partial(trio.run_process, command("vms", "console", "demo"), stdin=b"halt\n", check=False)
            pipes = partial(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ, cwd=ROOT)
            process: trio.Process = await nursery.start(pipes)
            assert process.stdout is not None
            assert process.stderr is not None
            assert await desk.heard(5) == b"halt\n"
            desk.say(b"\xff\0bye")
            said = b""
            with trio.fail_after(15):
                while len(said) < 5:
                    said += await process.stdout.receive_some()
                desk.shut.cancel()
                assert await process.wait() == 0
            assert said == b"\xff\0bye"
            assert await process.stderr.receive_some() == b"volar: the VM is crashed\n"
