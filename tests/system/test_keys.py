"""Only the daemon knows an API key: no hypervisor, guest or file contains it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.files import files_in
from volant.client import Client

from .kit import Daemon, boot, run

KEY = "k3y-0123456789abcdef"
OF_THE_FILE = "file-0123456789abcdef"


def read(path: str) -> bytes:
    return Path(path).read_bytes()


async def test_a_key_is_in_no_hypervisor_guest_event_log_or_file(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_text(OF_THE_FILE)
    file.chmod(0o600)
    daemon = make_daemon("--api-key-file", str(file), "--log-level", "debug", environ={"VOLANT_API_KEY": KEY})
    async with Client(daemon.base_url, api_key=KEY) as client:
        await boot(client, "demo")
        (pid,) = daemon.hypervisors()
        environment = read(f"/proc/{pid}/environ")
        assert b"VOLANT" not in environment
        said = environment + read(f"/proc/{pid}/cmdline") + read(f"/proc/{daemon.pid}/cmdline")
        said += (await run(client, "demo", "sh", "-c", "cat /proc/1/environ /proc/cmdline; env")).encode()
        for root in (daemon.state_dir, daemon.runtime_dir):
            said += b"".join(data for _, data in files_in(root))
        await client.vms.delete("demo")
    said += daemon.log_path.read_bytes()
    for key in (KEY, OF_THE_FILE):
        assert key.encode() not in said
