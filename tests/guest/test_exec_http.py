"""Commands over HTTP: output arrives complete, the end is reported once, and nothing outlives the client."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from tests.guest.conftest import Answer, Asker, read_all, read_until


def output(lines: list[Any], stream: str = "stdout") -> bytes:
    return b"".join(base64.b64decode(line["data"]) for line in lines if line.get("stream") == stream)


def gone(pid: int) -> bool:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state in "ZX":
            return True
        time.sleep(0.01)
    return False


def start(agent: Asker, *command: str, **fields: object) -> socket.socket:
    body = json.dumps({"command": list(command), **fields}).encode()
    return agent.open(b"POST /v1/exec HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def first_pid(sock: socket.socket) -> int:
    data = read_until(sock, lambda data: b'"data"' in data and data.endswith(b"\n\r\n"))
    body = data.partition(b"\r\n\r\n")[2].split(b"\r\n")[1]
    return int(base64.b64decode(json.loads(body)["data"]))


def test_both_streams_and_the_exit_code(agent: Asker) -> None:
    lines = agent.run("sh", "-c", "echo out; echo err >&2; exit 7")
    assert output(lines) == b"out\n"
    assert output(lines, "stderr") == b"err\n"
    assert lines[-1] == {"exit_code": 7}
    assert all("stream" in line for line in lines[:-1])


def test_the_end_by_a_signal_is_reported(agent: Asker) -> None:
    assert agent.run("sh", "-c", "kill -KILL $$")[-1] == {"signal": signal.SIGKILL}


def test_environment_directory_and_stdin(agent: Asker, tmp_path: Path) -> None:
    data = os.urandom(300_000)
    lines = agent.run(
        "sh",
        "-c",
        'echo "$A $PWD"; sha256sum',
        env={"A": "ä b"},
        cwd=str(tmp_path),
        stdin=base64.b64encode(data).decode(),
    )
    assert output(lines).decode().splitlines() == [f"ä b {tmp_path}", hashlib.sha256(data).hexdigest() + "  -"]


def test_unread_stdin_is_not_an_error(agent: Asker) -> None:
    assert agent.run("true", stdin=base64.b64encode(b"x" * 500_000).decode()) == [{"exit_code": 0}]


def test_an_empty_stdin_is_the_default(agent: Asker) -> None:
    assert output(agent.run("cat")) == b""


def test_a_command_gets_the_base_environment(agent: Asker) -> None:
    names = {line.split("=")[0] for line in output(agent.run("env")).decode().splitlines()}
    assert names <= {"PATH", "HOME", "LANG"}


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"command": ["no-such-program"]}, "not_found"),
        ({"command": ["/etc/passwd"]}, "not_executable"),
        ({"command": ["true"], "cwd": "/no/such/folder"}, "no_such_directory"),
        ({"command": ["true"], "cwd": "/etc/passwd"}, "no_such_directory"),
        ({"command": ["true"], "user": "nobody-at-all"}, "no_such_user"),
    ],
)
def test_a_command_that_does_not_start_reports_why(agent: Asker, fields: dict[str, object], code: str) -> None:
    lines = agent.ask("POST", "/v1/exec", fields).lines()
    assert len(lines) == 1
    assert lines[0]["code"] == code
    assert lines[0]["error"]


def test_a_script_without_its_interpreter_says_so(agent: Asker, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/no/such/shell\n")
    script.chmod(0o755)
    [end] = agent.ask("POST", "/v1/exec", {"command": [str(script)]}).lines()
    assert (end["code"], "interpreter" in end["error"]) == ("not_executable", True)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "command"),
        ({"command": []}, "command"),
        ({"command": "true"}, "command"),
        ({"command": ["a\0b"]}, "command"),
        ({"command": [""]}, "command"),
        ({"command": [1]}, "command"),
        ({"command": ["true"], "env": {"A=B": "x"}}, "env"),
        ({"command": ["true"], "env": {"A": 1}}, "env"),
        ({"command": ["true"], "env": []}, "env"),
        ({"command": ["true"], "env": None}, "env"),
        ({"command": ["true"], "cwd": "relative"}, "cwd"),
        ({"command": ["true"], "user": 0}, "user"),
        ({"command": ["true"], "timeout_s": 0}, "timeout_s"),
        ({"command": ["true"], "timeout_s": True}, "timeout_s"),
        ({"command": ["true"], "timeout_s": "1"}, "timeout_s"),
        ({"command": ["true"], "stdin": "%%%"}, "stdin"),
        ({"command": ["true"], "tty": True}, "tty"),
    ],
)
def test_a_wrong_field_is_a_400_that_names_it(agent: Asker, fields: dict[str, object], field: str) -> None:
    answer = agent.ask("POST", "/v1/exec", fields)
    assert answer.status == 400
    assert answer.json()["field"] == field


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can run things as somebody else")
def test_user_and_group(agent: Asker) -> None:
    assert output(agent.run("id", "-u", user="nobody")) == b"65534\n"
    assert output(agent.run("id", "-g", user="nobody:0")) == b"0\n"
    assert output(agent.run("id", "-u", user="1234")) == b"1234\n"
    # Without an entry it has the group 0, as in a container.
    assert output(agent.run("id", "-G", user="1234")) == b"0\n"


def test_a_timeout_kills_the_process_group_and_keeps_the_output(agent: Asker) -> None:
    lines = agent.run("sh", "-c", "sleep 1000 & echo $!; wait", timeout_s=0.3)
    assert lines[-1]["code"] == "timeout"
    assert gone(int(output(lines)))


def test_a_client_that_leaves_ends_its_processes(agent: Asker) -> None:
    sock = start(agent, "sh", "-c", "sleep 1000 & echo $!; wait")
    pid = first_pid(sock)
    sock.close()
    assert gone(pid)


def test_a_client_that_leaves_after_a_half_close_ends_its_processes(agent: Asker) -> None:
    sock = start(agent, "sh", "-c", "sleep 1000 & echo $!; wait")
    sock.shutdown(socket.SHUT_WR)
    pid = first_pid(sock)
    sock.close()
    assert gone(pid)


def test_background_processes_are_not_waited_for(agent: Asker) -> None:
    lines = agent.run("sh", "-c", "sleep 1000 & echo $!")
    assert lines[-1] == {"exit_code": 0}
    pid = int(output(lines))
    os.kill(pid, 0)
    os.kill(pid, signal.SIGKILL)


def test_fifty_megabytes_arrive_intact(agent: Asker) -> None:
    size = 50_000_000
    lines = agent.run("sh", "-c", f"head -c {size} /dev/zero")
    assert lines[-1] == {"exit_code": 0}
    assert hashlib.sha256(output(lines)).digest() == hashlib.sha256(bytes(size)).digest()


def test_twenty_commands_at_once_do_not_mix(agent: Asker) -> None:
    results: dict[int, bytes] = {}

    def one(number: int) -> None:
        results[number] = output(agent.run("sh", "-c", f"head -c 300000 /dev/zero | tr '\\0' {chr(97 + number)}"))

    threads = [threading.Thread(target=one, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: chr(97 + number).encode() * 300_000 for number in range(20)}


def test_a_client_that_does_not_read_blocks_the_command(agent: Asker, tmp_path: Path) -> None:
    counter = tmp_path / "written"
    script = f"i=0; while [ $i -lt 400 ]; do head -c 65536 /dev/zero; i=$((i+1)); echo $i > {counter}; done"
    sock = start(agent, "sh", "-c", script)
    last = -1
    while (now := int(counter.read_text() or -1) if counter.exists() else 0) != last or now == 0:
        last = now
        time.sleep(0.3)
    assert 0 < last < 100
    answer = Answer(read_all(sock))
    assert len(output(answer.lines())) == 400 * 65536


def test_a_timeout_counts_while_the_client_does_not_read(agent: Asker) -> None:
    sock = start(agent, "sh", "-c", "echo $$; sleep 0.2; exec cat /dev/zero", timeout_s=0.5)
    pid = first_pid(sock)
    assert gone(pid)
