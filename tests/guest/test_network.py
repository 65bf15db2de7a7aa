"""The NIC's settings and the guest's hosts: parsed strictly, written without losing other lines."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from volant.guest import _identity, _network, _root
from volant.guest._network import Interface, boot, check_name, hosts_text

from .conftest import needs_chroot

IMAGE = "127.0.0.1 localhost\n::1 localhost\n"
MAC = "02:ab:00:00:00:07"


def test_interface_settings_are_parsed() -> None:
    settings = Interface("192.168.127.7", 24, "192.168.127.1", MAC)
    assert (settings.address, settings.prefix, settings.gateway) == ("192.168.127.7", 24, "192.168.127.1")
    assert settings.mac == bytes.fromhex("02ab00000007")


@pytest.mark.parametrize(
    ("address", "prefix", "gateway", "mac", "why"),
    [
        ("192.168.127.7/24", 24, "192.168.127.1", MAC, "address"),
        ("192.168.127", 24, "192.168.127.1", MAC, "address"),
        ("::1", 24, "192.168.127.1", MAC, "address"),
        ("192.168.127.7\0", 24, "192.168.127.1", MAC, "address"),
        ("192.168.127.7", 0, "192.168.127.1", MAC, "prefix"),
        ("192.168.127.7", 31, "192.168.127.6", MAC, "prefix"),
        ("192.168.127.7", 24, "", MAC, "gateway"),
        ("192.168.127.7", 24, "192.168.128.1", MAC, "gateway"),
        ("192.168.127.7", 24, "192.168.127.7", MAC, "gateway"),
        ("192.168.127.7", 24, "192.168.127.1", "02:ab:00:00:07", "mac"),
        ("192.168.127.7", 24, "192.168.127.1", "02:ab:00:00:00:+7", "mac"),
        ("192.168.127.7", 24, "192.168.127.1", "03:ab:00:00:00:07", "mac"),
        ("192.168.127.7", 24, "192.168.127.1", "00:00:00:00:00:00", "mac"),
    ],
)
def test_impossible_interface_settings_are_refused(address: str, prefix: int, gateway: str, mac: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Interface(address, prefix, gateway, mac)


def test_hosts_are_replaced_and_other_lines_stay() -> None:
    one = hosts_text(IMAGE, {"demo": "192.168.127.2"})
    assert one.startswith(IMAGE)
    assert "\n192.168.127.2 demo\n" in one
    # A user has added a line below.
    other = hosts_text(one + "10.0.0.1 mine\n", {"demo": "192.168.127.3", "site": "192.168.127.4"})
    assert other.startswith(IMAGE + "10.0.0.1 mine\n")
    assert "192.168.127.2" not in other
    assert other.count("192.168.127.3 demo\n192.168.127.4 site\n") == 1
    assert hosts_text(other, {}) == hosts_text(IMAGE + "10.0.0.1 mine\n", {})


@needs_chroot
def test_a_root_filesystem_gets_hosts_and_name_servers_and_keeps_its_lines(
    mounted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's own root, here `tmp_path`, gets the same. A link in the root filesystem does not lead out of it."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hosts").write_text(IMAGE)
    (mounted / "files").mkdir()
    (mounted / "files/hosts").write_text("10.0.0.1 mine\n")
    (mounted / "files/resolv.conf").write_text("nameserver 10.0.0.1\n")
    (mounted / "etc").rmdir()
    (mounted / "etc").symlink_to("/files")
    assert _root.state() == ("mounted", "")
    monkeypatch.setattr(_root, "ROOT", "/root")
    monkeypatch.setattr(_network, "apply", lambda interface: None)
    interface = Interface("192.168.127.7", 24, "192.168.127.1", MAC)

    def set_network() -> None:
        _root._enter(str(tmp_path))
        _identity.set_network("demo", interface, ["192.168.127.1", "9.9.9.9"], {"other": "192.168.127.8"})

    with ThreadPoolExecutor() as thread:
        thread.submit(set_network).result()
    for etc, before in ((tmp_path / "etc", IMAGE), (mounted / "files", "10.0.0.1 mine\n")):
        assert (etc / "resolv.conf").read_text() == "nameserver 192.168.127.1\nnameserver 9.9.9.9\n"
        hosts = (etc / "hosts").read_text()
        assert hosts == hosts_text(before, {"demo": "192.168.127.7", "other": "192.168.127.8"})


@pytest.mark.parametrize("before", ["", "10.0.0.1 mine"])
def test_a_hosts_file_may_be_empty_or_lack_its_last_newline(before: str) -> None:
    lines = hosts_text(before, {"demo": "192.168.127.2"}).splitlines()
    assert lines[0] in (before, lines[-3])
    assert lines[-2] == "192.168.127.2 demo"


@pytest.mark.parametrize("name", ["", "a b", "a\n10.0.0.1 bank", "#", "ä", "x" * 64, "-"])
def test_malformed_names_do_not_get_into_the_file(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        check_name(name)


@pytest.mark.parametrize(
    "network",
    ["nonsense", "192.168.127.2,192.168.127.1,02:ab:00:00:00:07", "192.168.127.2/x,192.168.127.1,02:ab:00:00:00:07"],
)
def test_a_malformed_command_line_costs_the_network_only(network: str) -> None:
    loaded: list[bool] = []
    said: list[str] = []
    boot(network, "", lambda: loaded.append(True), said.append)
    (text,) = said
    assert text.startswith("the network can't be set up: ")
    assert loaded == [True]


@pytest.mark.parametrize("fails", [False, True])
def test_a_nic_without_settings_stays_unbound_and_later_devices_are_bound(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it has nothing of the template when a clone binds it."""
    monkeypatch.setattr(_network, "_BUS", str(tmp_path))
    probes = tmp_path / "drivers_autoprobe"
    probes.write_text("1")
    said: list[str] = []

    def load() -> None:
        assert probes.read_text() == "0"
        if fails:
            raise OSError("there is no such module")

    boot("", "", load, said.append)
    assert probes.read_text() == "1"
    assert bool(said) == fails


def test_the_unbound_nic_is_found_and_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_network, "_BUS", str(tmp_path))
    monkeypatch.setattr(_network, "_INTERFACES", str(tmp_path / "net"))
    for name, kind in (("virtio0", "0x0003"), ("virtio1", "0x0001")):
        (tmp_path / "devices" / name).mkdir(parents=True)
        (tmp_path / "devices" / name / "device").write_text(f"{kind}\n")
    (tmp_path / "drivers" / "virtio_net").mkdir(parents=True)
    (tmp_path / "net" / "lo").mkdir(parents=True)
    assert _network._bind() == "", "the kernel has made nothing of it"
    assert (tmp_path / "drivers" / "virtio_net" / "bind").read_text() == "virtio1"
    (tmp_path / "net" / "eth0" / "device").mkdir(parents=True)
    assert _network._interface_name() == "eth0"
