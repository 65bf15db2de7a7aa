"""`volar setup` on a real systemd: what a dry run does not do, what a second one leaves alone, keys and addresses."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.processes import READS_ALL
from tests.systemd.kit import Box

KEY = "a-key-that-nobody-may-see-7f3b"
WORSE = """[Service]
Environment=VOLANT_API_LISTEN_ADDR=127.0.0.1:7780,127.0.0.1:7777
"""


def test_a_dry_run_does_nothing_and_a_second_run_changes_nothing(box: Box) -> None:
    said = box.volar("setup", "--dry-run").stdout
    assert "# write /etc/systemd/system/volantd.service" in said
    assert box.run("ls", "/etc/systemd/system").stdout == ""
    assert box.systemctl("list-units", "--all", "--no-legend", "volant*").stdout == ""

    first = box.volar("setup")
    assert first.stderr.count("wrote /etc/systemd/system/volant") == 4
    held = box.show("volantd.socket", "ActiveEnterTimestampMonotonic")
    guests = box.show("volant-guests.service", "ActiveEnterTimestampMonotonic")
    second = box.volar("setup")
    assert "wrote" not in second.stderr
    assert box.show("volantd.service", "ActiveState") == "active"
    assert box.show("volantd.socket", "ActiveEnterTimestampMonotonic") == held
    assert box.show("volant-guests.service", "ActiveEnterTimestampMonotonic") == guests
    assert {box.systemctl("is-enabled", f"volantd.{kind}").stdout.strip() for kind in ("service", "socket")} == {
        "enabled"
    }


def test_a_credential_is_the_key_that_clients_must_show(box: Box) -> None:
    # In a real host's /etc/credstore, which is not this box's own.
    store = Path(f"/proc/{box.init}/root/run/credstore")
    store.mkdir(mode=0o700)
    (store / "volant-api-key").write_text(f"# of this host\n{KEY}\n")
    (store / "volant-api-key").chmod(0o600)
    socket = Path(f"/proc/{box.init}/root/etc/systemd/system/volantd.socket.d")
    socket.mkdir()
    (socket / "test.conf").write_text("[Socket]\nListenStream=127.0.0.1:7777\n")
    box.volar("setup")

    tcp = ("--api", "http://127.0.0.1:7777")
    refused = box.volar(*tcp, "system", "status", check=False)
    assert refused.returncode == 1
    assert "API key" in refused.stderr
    box.volar(*tcp, "--api-key-file", "/run/credstore/volant-api-key", "system", "status")
    # What has the rights on the socket needs no key.
    box.volar("system", "status")

    pid = box.show("volantd.service", "MainPID")
    for place in ("environ", "cmdline"):
        assert KEY not in box.run("cat", f"/proc/{pid}/{place}").stdout
    assert KEY not in box.systemctl("show", "volantd.service").stdout
    assert not any(KEY in text for text in box.said())

    # Another key counts after a restart: systemd hands credentials in when a service starts.
    (store / "volant-api-key").write_text("another-key-than-before-1c9d\n")
    box.systemctl("restart", "volantd.service")
    assert box.volar(*tcp, "--api-key-file", "/run/credstore/volant-api-key", "system", "status").returncode == 0

    # And without one it does not run: every local user would command it.
    (store / "volant-api-key").unlink()
    box.systemctl("stop", "volantd.service")
    box.systemctl("start", "volantd.service")
    box.until(lambda: box.show("volantd.service", "ActiveState") == "failed", 30)
    assert box.show("volantd.service", "ExecMainStatus") == "2"
    assert any("listens on TCP only with an API key" in text for text in box.said("_SYSTEMD_UNIT=volantd.service"))


def test_the_service_of_root_listens_for_members_of_its_group_alone(box: Box) -> None:
    box.volar("setup")
    assert box.run("stat", "-c", "%a %U %G", "/run/volant/volant.sock").stdout.split() == ["660", "root", "volant"]
    listening = box.run("cat", "/proc/net/tcp", "/proc/net/tcp6").stdout.splitlines()
    assert not [line for line in listening if line.split()[3] == "0A"]
    assert box.volar("system", "status").returncode == 0

    ask = "import sys; from volant.cli.main import main; sys.argv = ['volar', 'system', 'status']; main()"
    nobody = ("setpriv", "--reuid", "nobody", "--regid", "nogroup", *READS_ALL)
    refused = box.run(*nobody, "--clear-groups", sys.executable, "-c", ask, check=False)
    assert refused.returncode == 5, refused.stdout + refused.stderr
    assert "Permission denied" in refused.stderr
    assert "usermod -aG volant" in refused.stderr
    assert box.run(*nobody, "--groups", "volant", sys.executable, "-c", ask).returncode == 0


def test_the_socket_unit_says_where_to_listen_and_the_settings_are_told_of(box: Box) -> None:
    folder = Path(f"/proc/{box.init}/root/etc/systemd/system/volantd.service.d")
    folder.mkdir()
    (folder / "test.conf").write_text(WORSE)
    box.volar("setup")
    assert '"addresses": [\n    "unix:/run/volant/volant.sock"\n' in box.volar("--json", "system", "info").stdout
    told = [text for text in box.said("SYSLOG_IDENTIFIER=volantd") if "api_listen_addr" in text]
    assert len(told) == 1
    assert "127.0.0.1:7780 has no effect" in told[0]
    assert "systemctl edit volantd.socket" in told[0]

    # An address for every user of the host, and no key: it does not run, does not try again and again, and says why.
    socket = Path(f"/proc/{box.init}/root/etc/systemd/system/volantd.socket.d")
    socket.mkdir()
    (socket / "test.conf").write_text("[Socket]\nListenStream=127.0.0.1:8080\n")
    (folder / "test.conf").unlink()
    box.systemctl("daemon-reload")
    box.systemctl("stop", "volantd.service", "volantd.socket")
    box.systemctl("start", "volantd.service")
    box.until(lambda: box.show("volantd.service", "ActiveState") == "failed", 30)
    assert box.show("volantd.service", "ExecMainStatus") == "2"
    assert any(
        "listens on TCP only with an API key" in text
        for text in box.said("UNIT=volantd.service", "+", "_SYSTEMD_UNIT=volantd.service")
    )
