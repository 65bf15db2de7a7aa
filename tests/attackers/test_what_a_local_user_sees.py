"""A local user reads, writes and connects to nothing of the daemon, except for reading public images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.attackers.local_user import needs_root, run_code
from tests.files import everything_in
from tests.system.kit import Daemon, boot

pytestmark = [pytest.mark.system, pytest.mark.cold, needs_root]

TRIES = """
import json, os, socket, stat, sys
got = []
for path in json.loads(sys.argv[1]):
    def tries(how, act):
        try:
            act()
        except OSError:
            return
        got.append([how, path])
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        continue
    if stat.S_ISDIR(mode):
        tries("lists", lambda: os.listdir(path))
        tries("writes in", lambda: os.close(os.open(path + "/mine", os.O_CREAT | os.O_WRONLY)))
        tries("makes a link in", lambda: os.symlink("/etc", path + "/link"))
    elif stat.S_ISSOCK(mode):
        tries("connects to", lambda: socket.socket(socket.AF_UNIX).connect(path))
    elif stat.S_ISREG(mode) or stat.S_ISFIFO(mode):
        tries("reads", lambda: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
        tries("writes", lambda: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK)))
print(json.dumps(got))
"""


async def test_a_local_user_can_use_nothing_of_a_running_vm(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon("--listen", "unix:/tmp/vt-local-user.sock")
    async with daemon.client() as client:
        await boot(client, "demo")
        places = [daemon.state_dir, daemon.runtime_dir, daemon.memory_dir, Path("/tmp/vt-local-user.sock")]
        paths = sorted({str(each) for place in places for each in (place, *everything_in(place))})
        assert any(path.endswith("qmp.sock") for path in paths)
        assert any(path.startswith(f"{daemon.memory_dir}/") for path in paths)
        assert json.loads(run_code(TRIES, json.dumps(paths))) == []
        # The search finds a file that is open to all.
        mistake = daemon.root / "mistake"
        mistake.write_text("a secret")
        mistake.chmod(0o644)
        assert json.loads(run_code(TRIES, json.dumps([str(mistake)]))) == [["reads", str(mistake)]]
        mistake.unlink()
