"""Settings for networks and DNS servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from volant.daemon._command_line import load
from volant.daemon._part_settings import nameservers_of_daemon, nameservers_of_host
from volant.daemon._settings import SettingsError


def test_the_default_network_is_auto() -> None:
    settings, _ = load([], {}, uid=0)
    assert (settings.network, settings.bridge, settings.subnet) == ("auto", "", "192.168.127.0/24")


def test_network_settings_are_read_from_the_environment() -> None:
    environ = {
        "VOLANT_NETWORK": "bridge",
        "VOLANT_BRIDGE": "lab0",
        "VOLANT_SUBNET": "10.87.0.0/16",
        "VOLANT_NAMESERVERS": "9.9.9.9, 1.1.1.1",
    }
    settings, warnings = load([], environ, uid=0)
    assert (settings.network, settings.bridge, settings.subnet) == ("bridge", "lab0", "10.87.0.0/16")
    assert not warnings


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("network", "blue", "network"),
        ("subnet", "10.0.0.1/24", "host bits"),
        ("subnet", "10.0.0.0/31", "from 8 to 30"),
        ("subnet", "8.8.8.0/24", "private"),
        ("bridge", "a-name-too-long", "interface"),
        ("bridge", "br/0", "interface"),
        ("nameservers", "127.0.0.53", "nameservers"),
        ("nameservers", "dns.example", "nameservers"),
        ("nameservers", "9.9.9.9,9.9.9.8,9.9.9.7,9.9.9.6", "at most 3"),
    ],
)
def test_an_invalid_network_setting_is_named(name: str, value: str, text: str) -> None:
    with pytest.raises(SettingsError, match=text) as refused:
        load([f"--{name}={value}"], {}, uid=0)
    assert name in str(refused.value)


def test_the_default_dns_servers_are_the_hosts_without_the_host_itself(tmp_path: Path) -> None:
    stub, real = tmp_path / "resolv.conf", tmp_path / "real.conf"
    stub.write_text("# a stub\nnameserver 127.0.0.53\nnameserver ::1\noptions edns0\n")
    real.write_text(
        "nameserver 10.0.0.53\nnameserver fe80::1%eth0\nnameserver 10.0.0.54\nnameserver 10.0.0.53\nsearch x\n"
    )
    assert nameservers_of_host((stub, real)) == ("10.0.0.53", "10.0.0.54")
    assert nameservers_of_host((stub, tmp_path / "none")) == ()
    # The daemon itself can ask a server on loopback for guests with egress rules.
    assert nameservers_of_daemon((stub, real)) == ("127.0.0.53", "::1")
