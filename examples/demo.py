"""What `make demo` shows: a VM from nothing to nothing, with the commands that a user would type.

The daemon is one of its own, on a free port, with its own state; only the image cache is the usual one. Whatever
happens, also Ctrl-C, nothing else is left behind.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

READY_S = 30.0
STOP_S = 45.0
FOLLOW_S = 30.0
BIN = Path(sys.executable).parent


class DemoError(Exception):
    """The demo can't go on."""


def main() -> int:
    """Run the demo; return the exit code."""
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _interrupted)
    began = time.monotonic()
    try:
        with ExitStack() as stack:
            show(stack)
    except KeyboardInterrupt:
        print("\ninterrupted; everything is cleaned up", file=sys.stderr)
        return 130
    except DemoError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    print(f"\nDone in {time.monotonic() - began:.1f} s; nothing is left but the image in the cache.")
    return 0


def show(stack: ExitStack) -> None:
    """The story itself."""
    say("The boot image: a kernel and a minimal root file system, from Debian's packages")
    volar("images", "build")

    say("A daemon on a free port, with its own state")
    folder = stack.enter_context(scratch())
    api = stack.enter_context(daemon(folder))
    # The first of what is done at the end: nobody interrupts the rest of it.
    stack.callback(_ignore_signals)
    os.environ["VOLANT_API_BASE"] = api
    volar("system", "status")

    say("A VM, and its events as they arrive")
    stack.enter_context(background("vms", "watch", "--since", "0"))
    volar("vms", "create", "demo", "--memory", "256")
    volar("vms", "wait", "demo", "--timeout", "2m", "--json", quiet=True)
    volar("vms", "list")

    say("A command in the guest")
    volar("vms", "exec", "demo", "--", "uname", "-a")

    say("Its log, followed while the guest writes to its console")
    follow_logs()

    say("The supervisor tree of the daemon")
    volar("system", "tree")

    say("The end of it")
    volar("vms", "delete", "demo")


def follow_logs() -> None:
    """Follow the log until a line that is written meanwhile arrives."""
    words = ["vms", "logs", "demo", "--follow", "--tail", "3"]
    prompt(words)
    with subprocess.Popen([BIN / "volar", *words], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            volar("vms", "exec", "demo", "--", "sh", "-c", "echo hello from the guest > /dev/console")
            for line in lines(process.stdout.fileno(), FOLLOW_S):
                # The firmware talks to a terminal; this is none.
                print("  | " + "".join(filter(str.isprintable, line)), flush=True)
                if "hello from the guest" in line:
                    break
            else:
                raise DemoError("the log did not show what the guest wrote to its console")
        finally:
            finish(process)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for the daemon's state."""
    # Sockets lie beneath it, and a socket's path is short.
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 40 else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="volant-demo-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def daemon(folder: Path) -> Iterator[str]:
    """A running `volantd`; gives its address."""
    log = folder / "volantd.log"
    words = ["--ephemeral", "--listen", "127.0.0.1:0"]
    words += ["--state-dir", str(folder / "state"), "--runtime-dir", str(folder / "run")]
    print(f"$ volantd {shlex.join(words)} &", flush=True)
    # In a session of its own, so that Ctrl-C reaches us alone, and VMs are deleted before it goes.
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            [BIN / "volantd", *words], stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in lines(process.stdout.fileno(), READY_S):
                _, found, api = line.partition("listening on ")
                if found:
                    break
            else:
                raise DemoError("volantd did not start")
            print(line, flush=True)
            yield api.strip()
        except (DemoError, subprocess.SubprocessError):
            print(f"\nThe end of the daemon's log:\n{log.read_text(errors='replace')[-4000:]}", file=sys.stderr)
            raise
        finally:
            stop(process, folder)


def stop(process: subprocess.Popen[bytes], folder: Path) -> None:
    """End the daemon and see to it that nothing of it is left."""
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(STOP_S)
    left = processes_of(folder)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if left or process.returncode not in (0, -signal.SIGTERM):
        # What lies outside its folder is ours to remove now.
        from volant.vm import instance_of

        log = (folder / "volantd.log").read_text(errors="replace")[-4000:]
        shutil.rmtree(Path("/dev/shm") / f"volant-{instance_of(folder / 'state')}", ignore_errors=True)
        raise DemoError(f"volantd did not clean up; {len(left)} processes were killed. The end of its log:\n{log}")


def processes_of(folder: Path) -> list[int]:
    """Processes that work in `folder` or have it on their command line: the daemon's and its hypervisors."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                facts = os.fsencode((entry / "cwd").readlink()) + b"\0" + (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(folder) + b"/" in facts:
                found.append(int(entry.name))
    return found


@contextmanager
def background(*words: str) -> Iterator[None]:
    """A `volar` that goes on printing while the block runs."""
    print(f"$ volar {shlex.join(words)} &", flush=True)
    with subprocess.Popen([BIN / "volar", *words], start_new_session=True) as process:
        try:
            yield
            # The last event is on its way.
            time.sleep(0.3)
        finally:
            finish(process)


def finish(process: subprocess.Popen[bytes], signum: int = signal.SIGTERM) -> None:
    """End a `volar`."""
    process.send_signal(signum)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def volar(*words: str, quiet: bool = False) -> None:
    """Run one command to its end. :raises DemoError: it failed."""
    if not quiet:
        prompt(words)
    # Ctrl-C reaches us alone, and we end it as it deserves.
    with subprocess.Popen(
        [BIN / "volar", *words], stdout=subprocess.DEVNULL if quiet else None, start_new_session=True
    ) as process:
        try:
            code = process.wait()
        except BaseException:
            # It has something to clean up when it builds an image.
            finish(process, signal.SIGINT if words[0] == "images" else signal.SIGTERM)
            raise
    if code:
        raise DemoError(f"volar {shlex.join(words)} ended with {code}")


def lines(fd: int, timeout_s: float) -> Iterator[str]:
    """The lines that arrive within `timeout_s`."""
    give_up_at = time.monotonic() + timeout_s
    text = b""
    while (left_s := give_up_at - time.monotonic()) > 0:
        if not select.select([fd], [], [], left_s)[0]:
            return
        piece = os.read(fd, 65536)
        if not piece:
            return
        *whole, text = (text + piece).split(b"\n")
        for line in whole:
            yield line.decode(errors="replace").rstrip("\r")


def say(text: str) -> None:
    """A heading."""
    print(f"\n# {text}", flush=True)


def prompt(words: tuple[str, ...] | list[str]) -> None:
    """The command as one would type it."""
    print(f"$ volar {shlex.join(words)}", flush=True)


def _ignore_signals() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)


def _interrupted(signum: int, frame: object) -> None:
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
