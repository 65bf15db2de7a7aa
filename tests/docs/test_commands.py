"""Every command block of the documentation runs as it is printed, or its page says why it can't here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples.demo import processes_of
from tests.docs.pages import PAGES, REPOSITORY, Block, blocks, parts
from volant.vm import instance_of

_BLOCK_S = 240.0
_INTERRUPT_S = 4
_TOKEN = "=-= block ends: "
_READY = "for i in $(seq 600); do curl -s http://127.0.0.1:7777/healthz | grep -q '\"ok\"' && break; sleep 0.1; done"
_CLEAN = f"""{sys.executable} - <<'END'
import http.client, json, os, urllib.parse
daemon = http.client.HTTPConnection("127.0.0.1", 7777, timeout=60)
headers = {{"X-Volant-API-Key": os.environ["VOLANT_API_KEY"]}} if "VOLANT_API_KEY" in os.environ else {{}}
def ask(method, path):
    daemon.request(method, "/api/v1/" + path, headers=headers)
    answer = daemon.getresponse()
    body = answer.read()
    if answer.status == 401:
        # The state of a daemon whose page has made keys is removed as a whole.
        raise SystemExit
    assert answer.status < 300, (path, body)
    return json.loads(body or "[]")
try:
    daemon.connect()
except OSError:
    # The page has stopped it.
    raise SystemExit from None
for kind in ("vms", "snapshots", "plugins", "networks", "volumes", "secrets"):
    for each in ask("GET", kind):
        if not each.get("builtin"):
            ask("DELETE", f"{{kind}}/{{urllib.parse.quote(each['name'])}}")
END"""
_ALONE = r"""
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs "$0"
mkdir "$0/upper" "$0/work"
mount -t overlay overlay -o "lowerdir=/etc,upperdir=$0/upper,workdir=$0/work" /etc
for each in /run /srv /var/backups; do mount -t tmpfs -o mode=755 tmpfs "$each"; done
exec bash --norc
"""
"""Gives a shell its own loopback, where the daemon has the port that pages name, and its own copies of the directories
that pages write to."""
RUN = [page for page in PAGES if any("not run" not in block.words for block in blocks(page) if not block.file)]

FIRST = ("README", "first-vm")
"""What a newcomer reads; `make test-all` runs all pages."""


class Shell:
    """The shell of one page, in its own network namespace, where the port that pages name is free."""

    def __init__(self, home: Path, root: Path, cache: Path) -> None:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("VOLANT_")}
        environ = inherited | {
            "PATH": f"{root}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
            "HOME": str(home),
            "VOLANT_STATE_DIR": str(root / "s"),
            "VOLANT_RUNTIME_DIR": str(root / "r"),
            "VOLANT_CACHE_DIR": str(cache),
            "VOLANT_ACCELERATOR": "tcg",
            "REPOSITORY": str(REPOSITORY),
        }
        etc = root / "etc"
        etc.mkdir(exist_ok=True)
        # Pages build images of Debian's packages, which only the tests' own network reaches.
        apt = root / "bin/apt-get"
        apt.parent.mkdir(exist_ok=True)
        apt.write_text(f'#!/bin/sh\nexec nsenter --net=/proc/{os.getpid()}/ns/net /usr/bin/apt-get "$@"\n')
        apt.chmod(0o755)
        self._home = home
        self._process = subprocess.Popen(
            ["unshare", "--net", "--mount", "--", "sh", "-ec", _ALONE, str(etc)],
            cwd=home,
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        # Record each failed command, even if later commands succeed.
        self.run("set -E; failed=; trap 'failed=\"$failed $?\"' ERR")

    def run(self, text: str) -> tuple[str, list[int]]:
        """Runs a block; returns what it prints, and the exit codes of its commands that failed."""
        script = self._home / ".block"
        # The trap has already recorded the last command; `:` keeps it from recording the script, too.
        script.write_text(f"{text}\n:\n")
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        guard = subprocess.Popen(
            ["sh", "-c", f"sleep {_BLOCK_S:g}; kill -9 {self._process.pid}"], start_new_session=True
        )
        try:
            self._process.stdin.write(f"failed=; . {script} </dev/null; echo; echo '{_TOKEN}'$failed\n")
            self._process.stdin.flush()
            said: list[str] = []
            for line in self._process.stdout:
                if line.startswith(_TOKEN):
                    return "".join(said).removesuffix("\n"), [int(code) for code in line[len(_TOKEN) :].split()]
                said.append(line)
        finally:
            os.killpg(guard.pid, 9)
            guard.wait()
        raise AssertionError(f"the shell ended, or took longer than {_BLOCK_S:g} s, in: {text}\n{''.join(said)}")

    def close(self) -> None:
        try:
            said, _ = self.run(f"{_CLEAN}\njobs -p | xargs -r kill; wait")
            assert "Error" not in said, said
        finally:
            self._process.kill()
            self._process.communicate()


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """The state of all daemons of the pages, so that they share one template."""
    # Short: a socket path has at most 108 bytes.
    made = Path(tempfile.mkdtemp(prefix="vd", dir="/tmp"))
    made.chmod(0o711)
    try:
        yield made
    finally:
        _clear(made)
        made.rmdir()


def _clear(root: Path) -> None:
    """Ends the hypervisors that a page has left, and removes its daemon's state."""
    for pid in processes_of(root):
        os.kill(pid, signal.SIGKILL)
    for each in root.iterdir():
        # The memory of VMs of a daemon that a page has killed, if this is its state.
        shutil.rmtree(f"/dev/shm/volant-{instance_of(each)}", ignore_errors=True)
        shutil.rmtree(each, ignore_errors=True)


@pytest.mark.system
@pytest.mark.skipif(os.getuid() != 0, reason="makes network namespaces as root")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=() if page.stem in FIRST else pytest.mark.full) for page in RUN],
)
def test_commands_run_as_printed(page: Path, root: Path, image_cache: Path, tmp_path: Path) -> None:
    shell = Shell(tmp_path, root, image_cache)
    try:
        try:
            _run_page(shell, page)
        finally:
            shell.close()
    except BaseException:
        _clear(root)
        raise
    if "keys create" in page.read_text():
        # The daemons of other pages would ask for one: that TCP was closed is never forgotten.
        _clear(root)


def _run_page(shell: Shell, page: Path) -> None:
    todo = blocks(page)
    if not any(block.text.startswith("volantd &") for block in todo):
        shell.run(f"volantd >volantd.log 2>&1 &\n{_READY}")
    for block in todo:
        if block.file:
            # With a path of its own it lies in a directory that only the shell sees.
            shell.run(f"cat >{block.file} <<'{_TOKEN}'\n{block.text}\n{_TOKEN}")
        elif "not run" not in block.words:
            _run(shell, page, block)


def _run(shell: Shell, page: Path, block: Block) -> None:
    where = f"{page.relative_to(REPOSITORY)}:{block.line}"
    if "before" in block.words:
        said, codes = shell.run(block.words["before"])
        assert not codes, f"{where}: what comes before it fails with {codes}:\n{said}"
    for command, expected in block.commands():
        if "until interrupted" in block.words:
            said, codes = shell.run(f"timeout --signal=INT {_INTERRUPT_S} bash -c {shlex.quote(command)}")
            assert codes in ([], [124], [130]), f"{where}: {command}\nfails with {codes}:\n{said}"
            continue
        said, codes = shell.run(command)
        if command.endswith("&") or re.match(r"volantd &", command):
            shell.run(_READY)
        wanted = [int(code) for code in block.words.get("exits", "").split()]
        assert codes == wanted, f"{where}: {command}\nexits with {codes or 0}:\n{said}"
        if expected and "example output" not in block.words:
            pattern = r".*?".join(re.escape(part) for part in re.split(r"\.\.\.|…", expected.strip()))
            assert re.fullmatch(pattern, said.strip(), re.DOTALL), f"{where}: {command}\nprints\n{said}"


def test_python_in_pages_compiles() -> None:
    for page in PAGES:
        for kind, line, text in parts(page.read_text()):
            if kind == "python" or (kind == "indented" and re.match(r"async with |import \w+\n|# \w+\.py\n", text)):
                source = "async def snippet():\n" + textwrap.indent(text, "    ")
                compile(source, f"{page.relative_to(REPOSITORY)}:{line}", "exec")


def test_a_block_that_is_not_run_has_a_reason() -> None:
    without = []
    for page in PAGES:
        for block in blocks(page):
            if "not run" in block.words:
                reason = block.words["not run"]
                print(f"{page.relative_to(REPOSITORY)}:{block.line} is not run: {reason}")
                named = re.findall(r"tests/[\w/.]+", reason)
                if len(reason) < 10 or not all((REPOSITORY / name).exists() for name in named):
                    without.append(f"{page}:{block.line}: {reason}")
    assert not without


def test_no_command_hides_in_another_kind_of_block() -> None:
    hidden = []
    for page in PAGES:
        known = set[int]()
        for block in blocks(page):
            known.update(range(block.line, block.line + block.text.count("\n") + 3))
        for number, line in enumerate(page.read_text().splitlines(), 1):
            if re.match(r"(?:    |    \$ |\$ )(?:volar|volantd) (?! )", line) and number not in known:
                hidden.append(f"{page.relative_to(REPOSITORY)}:{number}: {line}")
    assert not hidden
