"""What an operator sets is what the daemon does, and what it can't do it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from volant.daemon._settings import Settings, SettingsError, load, parse_address, split


def settings(*argv: str, **environ: str) -> Settings:
    return load(argv, environ, uid=0)[0]


def test_defaults_of_root_are_the_system_directories() -> None:
    found = settings()
    assert (found.state_dir, found.runtime_dir) == (Path("/var/lib/volant"), Path("/run/volant"))
    assert found.api_listen_addr == "127.0.0.1:7777"


def test_defaults_of_a_user_are_xdg() -> None:
    found, _ = load([], {"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/5"}, uid=5)
    assert found.state_dir == Path("/home/u/.local/state/volant")
    assert found.runtime_dir == Path("/run/user/5/volant")
    assert found.cache_dir == Path("/home/u/.cache/volant")


def test_flags_win_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "volantd.toml"
    file.write_text('api_listen_addr = ["127.0.0.1:1", "[::1]:1"]\nmax_vms = 1\naccelerator = "kvm"\n')
    assert settings("--config", str(file)).api_listen_addr == "127.0.0.1:1,[::1]:1"
    found = settings("--config", str(file), "--max-vms", "3", VOLANT_MAX_VMS="2", VOLANT_ACCELERATOR="tcg")
    assert (found.max_vms, found.accelerator) == (3, "tcg")


@pytest.mark.parametrize("text", ['nonsense = "1"\n', "max_vms = [\n", 'max_vms = "many"\n', "max_vms = -1\n"])
def test_a_file_that_does_not_fit_is_an_error_that_names_it(tmp_path: Path, text: str) -> None:
    file = tmp_path / "volantd.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=r"volantd\.toml"):
        settings("--config", str(file))


def test_a_missing_file_is_an_error() -> None:
    with pytest.raises(SettingsError, match="can't be read"):
        settings("--config", "/nowhere/volantd.toml")


def test_an_unknown_variable_is_a_warning() -> None:
    _, warnings = load([], {"VOLANT_NONSENSE": "1", "VOLANT_API_BASE": "http://x"}, uid=0)
    assert warnings == ["VOLANT_NONSENSE is not a setting of this version and does nothing"]


def test_an_unknown_flag_ends_with_usage() -> None:
    with pytest.raises(SystemExit) as caught:
        settings("--nonsense")
    assert caught.value.code == 2


@pytest.mark.parametrize("name", ["VOLANT_API_KEY", "VOLANT_API_KEY_FILE", "VOLANT_API_ALLOW_CIDR"])
def test_protection_that_is_not_there_is_refused_not_ignored(name: str) -> None:
    with pytest.raises(SettingsError, match=name):
        settings(**{name: "x"})


def test_an_open_address_needs_to_be_asked_for() -> None:
    with pytest.raises(SettingsError, match="--insecure"):
        settings("--listen", "0.0.0.0:7777")
    assert settings("--listen", "0.0.0.0:7777", "--insecure").insecure
    assert settings("--listen", "127.0.0.1:0,[::1]:0,unix:/run/volant.sock")


@pytest.mark.parametrize("address", ["7777", "127.0.0.1", "127.0.0.1:", ":7777", "127.0.0.1:x", "127.0.0.1:-1"])
def test_a_malformed_address_is_an_error(address: str) -> None:
    with pytest.raises(SettingsError, match="api_listen_addr"):
        settings("--listen", address)


def test_a_runtime_directory_too_long_for_sockets_is_refused() -> None:
    with pytest.raises(SettingsError, match="too long"):
        settings("--runtime-dir", "/" + "x" * 80)


def test_addresses_and_lists() -> None:
    assert parse_address("[::1]:80") == ("::1", 80)
    assert split(" a, ,b ") == ["a", "b"]


def test_the_reference_names_every_setting() -> None:
    text = (Path(__file__).parents[2] / "docs/reference/settings.md").read_text()
    assert [field for field in Settings.__struct_fields__ if f"`{field}`" not in text] == []
