"""A signal makes the daemon log what it is doing, even if its event loop hangs, and the daemon continues."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import trio

from tests.system.kit import Daemon, adopted, patched
from volant.client import Client

SECRET = "do-not-tell-anybody-42"


async def until_logged(daemon: Daemon, text: str) -> str:
    with trio.fail_after(30):
        while text not in (log := daemon.log_path.read_text()):  # noqa: ASYNC110 - a file
            await trio.sleep(0.05)
    return log


async def test_a_signal_logs_all_tasks_and_the_daemon_continues(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(environ={"VOLANT_API_KEY": SECRET, "VOLANT_LOG_LEVEL": "error"})
    async with daemon.client() as client, client.events():
        for number in (1, 2):
            os.kill(daemon.pid, signal.SIGUSR1)
            with trio.fail_after(30):
                while daemon.log_path.read_text().count("all tasks:") < number:  # noqa: ASYNC110
                    await trio.sleep(0.05)
        log = daemon.log_path.read_text()
        # The threads, from the signal handler, then the tree of tasks.
        assert log.index("Current thread") < log.index("all tasks:")
        assert "volant/daemon/_daemon.py" in log
        assert "journal" in log
        assert "volant/api/_events.py" in log
        shown = await client.system.tasks()
        assert "volant/daemon/_daemon.py" in shown
        assert "volant/concurrency/_task_dump.py" in shown
        await adopted(client)
    assert SECRET not in log + shown


async def test_an_event_loop_that_hangs_shows_where(make_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    hangs = f"""
import pathlib, sys, time
from volant.api import _app
def dump():
    print("it hangs", file=sys.stderr, flush=True)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not pathlib.Path({str(seen)!r}).exists():
        pass
    return ""
change(_app, "dump_tasks", dump)
"""
    daemon = make_daemon(wrapper=patched(hangs))
    async with Client(daemon.base_url) as client, trio.open_nursery() as nursery:
        nursery.start_soon(client.system.tasks)
        await until_logged(daemon, "it hangs")
        os.kill(daemon.pid, signal.SIGUSR1)
        log = await until_logged(daemon, "in dump")
        assert "all tasks:" not in log
        assert "volant/api/_app.py" in log
        seen.touch()
        assert "all tasks:" in await until_logged(daemon, "all tasks:")
        await adopted(client)


async def test_the_signal_does_not_kill_a_daemon_that_starts_or_stops(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon()
    assert daemon.stop() == 0
    daemon.launch()
    assert daemon.process is not None
    assert daemon.process.stdout is not None
    # From before the first line of its log until its end.
    with trio.fail_after(60):
        while not _is_safe_from(daemon.pid, signal.SIGUSR1):  # noqa: ASYNC110 - the kernel offers no wait
            await trio.sleep(0.005)
        sent = 0
        while sent < 300 or not _is_safe_from(daemon.pid, signal.SIGTERM):
            os.kill(daemon.pid, signal.SIGUSR1)
            sent += 1
            await trio.sleep(0.002)
        daemon.terminate()
        while daemon.process.poll() is None:
            os.kill(daemon.pid, signal.SIGUSR1)
            await trio.sleep(0.005)
    daemon.process.stdout.close()
    assert daemon.process.returncode == 0, daemon.log()


def _is_safe_from(pid: int, number: signal.Signals) -> bool:
    """Returns whether the process handles the signal now."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    masks = {name: int(mask, 16) for name, _, mask in lines if name in ("SigIgn", "SigCgt")}
    return bool((masks["SigIgn"] | masks["SigCgt"]) >> (number - 1) & 1)
