"""The demo of `make demo`: creates a VM, uses it and deletes it, with the commands that a user would type.

It starts its own daemon, on a free port and with its own state; only the cache of images is the usual one. It leaves
nothing else behind, even after Ctrl-C.
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
IMAGE = "localhost/debian:13"
BIN = Path(sys.executable).parent


class DemoError(Exception):
    """The demo cannot continue."""


def main() -> int:
    """Runs the demo; returns the exit code."""
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
    print(f"\nDone in {time.monotonic() - began:.1f} s; nothing is left but the images in the cache.")
    return 0


def show(stack: ExitStack) -> None:
    """Runs the steps of the demo."""
    say("The boot image: a kernel and a minimal root file system, from Debian's packages")
    volar("boot-images", "build")

    say("A daemon on a free port, with its own state")
    folder = stack.enter_context(scratch())
    api = stack.enter_context(daemon(folder))
    # From here on, a second Ctrl-C must not interrupt the clean-up.
    stack.callback(_ignore_signals)
    os.environ["VOLANT_API_BASE"] = api
    volar("system", "status")

    say("A program of an OCI image, in a VM of its own")
    if not is_cached(IMAGE):
        volar("images", "build", "debian")
    volar("run", "--rm", "--memory", "256M", IMAGE, "head", "-n", "1", "/etc/os-release")

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


def is_cached(image: str) -> bool:
    """Returns whether the cache has an OCI image."""
    with subprocess.Popen([BIN / "volar", "images", "list"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        return any(image in line for line in lines(process.stdout.fileno(), READY_S))


def follow_logs() -> None:
    """Follows the log until a new line arrives."""
    words = ["vms", "logs", "demo", "--follow", "--tail", "3"]
    prompt(words)
    with subprocess.Popen([BIN / "volar", *words], stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            volar("vms", "exec", "demo", "--", "sh", "-c", "echo hello from the guest > /dev/console")
            for line in lines(process.stdout.fileno(), FOLLOW_S):
                # Without the firmware's control sequences for a terminal.
                print("  | " + "".join(filter(str.isprintable, line)), flush=True)
                if "hello from the guest" in line:
                    break
            else:
                raise DemoError("the log did not show what the guest wrote to its console")
        finally:
            finish(process)


@contextmanager
def scratch() -> Iterator[Path]:
    """A directory for the daemon's state."""
    # Short: it holds sockets, whose paths have at most 108 bytes.
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) < 40 else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix="volant-demo-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def daemon(folder: Path) -> Iterator[str]:
    """Runs `volantd`; gives its address."""
    log = folder / "volantd.log"
    words = ["--ephemeral", "--listen", "127.0.0.1:0"]
    words += ["--state-dir", str(folder / "state"), "--runtime-dir", str(folder / "run")]
    print(f"$ volantd {shlex.join(words)} &", flush=True)
    # In its own session: Ctrl-C reaches only this program, which deletes the VMs before it stops the daemon.
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
    """Stops the daemon and removes all that is left of it."""
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
        # The daemon was killed: remove what it left outside its directory.
        from volant.vm import instance_of

        log = (folder / "volantd.log").read_text(errors="replace")[-4000:]
        shutil.rmtree(Path("/dev/shm") / f"volant-{instance_of(folder / 'state')}", ignore_errors=True)
        raise DemoError(f"volantd did not clean up; {len(left)} processes were killed. The end of its log:\n{log}")


def processes_of(folder: Path) -> list[int]:
    """Returns the processes that work in `folder` or have it on their command line: the daemon and its hypervisors."""
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
    """Runs a `volar` that prints while the block runs."""
    print(f"$ volar {shlex.join(words)} &", flush=True)
    with subprocess.Popen([BIN / "volar", *words], start_new_session=True) as process:
        try:
            yield
            # Let the last event arrive.
            time.sleep(0.3)
        finally:
            finish(process)


def finish(process: subprocess.Popen[bytes], signum: int = signal.SIGTERM) -> None:
    """Stops a `volar`."""
    process.send_signal(signum)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


def volar(*words: str, quiet: bool = False) -> None:
    """Runs one command to its end. :raises DemoError: if it fails"""
    if not quiet:
        prompt(words)
    # Ctrl-C reaches only this program, which then stops the command.
    with subprocess.Popen(
        [BIN / "volar", *words], stdout=subprocess.DEVNULL if quiet else None, start_new_session=True
    ) as process:
        try:
            code = process.wait()
        except BaseException:
            # Give it time to clean up a half-built image.
            finish(process, signal.SIGINT if "build" in words else signal.SIGTERM)
            raise
    if code:
        raise DemoError(f"volar {shlex.join(words)} ended with {code}")


def lines(fd: int, timeout_s: float) -> Iterator[str]:
    """Yields the lines that arrive within `timeout_s`."""
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
    """Prints a heading."""
    print(f"\n# {text}", flush=True)


def prompt(words: tuple[str, ...] | list[str]) -> None:
    """Prints the command as a user would type it."""
    print(f"$ volar {shlex.join(words)}", flush=True)


def _ignore_signals() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)


def _interrupted(signum: int, frame: object) -> None:
    del signum, frame
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
