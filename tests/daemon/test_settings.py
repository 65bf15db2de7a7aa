"""Settings are read from flags, environment and file, and an invalid one is an error that names it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from volant.daemon._command_line import GROUPS, load
from volant.daemon._part_settings import nameservers_of_daemon, nameservers_of_host
from volant.daemon._protection import UnreadableFile, read_given
from volant.daemon._settings import Settings, SettingsError, check, oidc_of, parse_address, parse_uids, resolve, split

KEY = "0123456789abcdef0123"


def settings(*argv: str, **environ: str) -> Settings:
    return load(argv, environ, uid=0)[0]


def keys_of(found: Settings) -> list[str]:
    return [key.reveal() for key in check(found).keys]


def test_defaults_of_root_are_the_system_directories() -> None:
    found = settings()
    assert (found.state_dir, found.runtime_dir) == (Path("/var/lib/volant"), Path("/run/volant"))
    assert found.api_listen_addr == "127.0.0.1:7777"


def test_defaults_of_a_user_are_xdg() -> None:
    found, _ = load([], {"HOME": "/home/u", "XDG_RUNTIME_DIR": "/run/user/5"}, uid=5)
    assert found.state_dir == Path("/home/u/.local/state/volant")
    assert found.runtime_dir == Path("/run/user/5/volant")
    assert found.cache_dir == Path("/home/u/.cache/volant")


def test_flags_override_the_environment_which_overrides_the_file(tmp_path: Path) -> None:
    file = tmp_path / "volantd.toml"
    file.write_text('api_listen_addr = ["127.0.0.1:1", "[::1]:1"]\nmax_vms = 1\naccelerator = "kvm"\n')
    assert settings("--config", str(file)).api_listen_addr == "127.0.0.1:1,[::1]:1"
    found = settings("--config", str(file), "--max-vms", "3", VOLANT_MAX_VMS="2", VOLANT_ACCELERATOR="tcg")
    assert (found.max_vms, found.accelerator) == (3, "tcg")


@pytest.mark.parametrize("text", ['nonsense = "1"\n', "max_vms = [\n", 'max_vms = "many"\n', "max_vms = -1\n"])
def test_an_invalid_settings_file_is_named(tmp_path: Path, text: str) -> None:
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


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("VOLANT_API_KEY", ""),
        ("VOLANT_API_KEY", "two words"),
        ("VOLANT_API_KEY", "schlüssel"),
        ("VOLANT_API_KEY", "a\nb"),
        ("VOLANT_API_KEY_FILE", ""),
        ("VOLANT_API_KEY_FILE", "/nowhere/keys"),
        ("VOLANT_API_KEY_FILE", "/"),
        ("VOLANT_API_KEY_FILE", "/dev/zero"),
        ("VOLANT_API_ALLOW_CIDR", ""),
        ("VOLANT_API_ALLOW_CIDR", "10.0.0.0/8,nonsense"),
        ("VOLANT_API_ALLOW_CIDR", "10.0.0.0/33"),
        ("VOLANT_API_ALLOW_CIDR", "10.0.0.1/8"),
        ("VOLANT_API_ALLOW_CIDR", "localhost"),
        ("VOLANT_TRUSTED_PROXIES", "proxy.example"),
        ("VOLANT_CORS_ORIGINS", "*"),
        ("VOLANT_CORS_ORIGINS", "null"),
        ("VOLANT_CORS_ORIGINS", "console.example"),
        ("VOLANT_CORS_ORIGINS", "https://*.example"),
        ("VOLANT_CORS_ORIGINS", "https://console.example/app"),
        ("VOLANT_CORS_ORIGINS", "https://console.example:port"),
    ],
)
def test_invalid_access_control_keeps_the_daemon_from_starting(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name.removeprefix("VOLANT_").lower()) as caught:
        settings(**{name: value})
    assert name != "VOLANT_API_KEY" or not value or value not in str(caught.value)


def test_a_key_comes_from_the_environment_or_a_file_and_never_a_flag(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        settings("--api-key", KEY)
    config = tmp_path / "volantd.toml"
    config.write_text(f'api_key = "{KEY}"\n')
    for found in (settings(VOLANT_API_KEY=KEY), settings("--config", str(config))):
        assert keys_of(found) == [KEY]
        assert KEY not in repr(found) + str(found)


def test_a_key_file_has_one_key_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# the old one\n{KEY}\n\n  {KEY[::-1]}  \r\n{KEY}\n")
    assert keys_of(settings("--api-key-file", str(file))) == [KEY, KEY[::-1]]
    assert keys_of(settings("--api-key-file", str(file), VOLANT_API_KEY="of-the-environment")) == [
        "of-the-environment", KEY, KEY[::-1],
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", "# nothing\n", "two words\n", "\x00\n", "k\n" * 101, "k" * 70_000])
def test_an_invalid_key_file_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text)
    with pytest.raises(SettingsError, match="api_key_file"):
        settings("--api-key-file", str(file))


def test_a_pipe_as_key_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "keys")
    with pytest.raises(SettingsError, match="not a regular file"):
        settings("--api-key-file", str(tmp_path / "keys"))


def test_systemds_credential_is_the_default_key_file(tmp_path: Path) -> None:
    (tmp_path / "volant-api-key").write_text(KEY)
    (tmp_path / "other").write_text(KEY[::-1])
    assert keys_of(settings(CREDENTIALS_DIRECTORY=str(tmp_path))) == [KEY]
    named = settings(CREDENTIALS_DIRECTORY=str(tmp_path), VOLANT_API_KEY_FILE=str(tmp_path / "other"))
    assert keys_of(named) == [KEY[::-1]]
    assert keys_of(settings(CREDENTIALS_DIRECTORY=str(tmp_path / "none"))) == []
    for place, warned in ((tmp_path / "none", 1), (tmp_path.parent, 0)):
        warnings = load([], {"CREDENTIALS_DIRECTORY": str(place)}, uid=0)[1]
        assert len(warnings) == warned
    with pytest.raises(SettingsError, match="credential"):
        settings(CREDENTIALS_DIRECTORY=str(tmp_path / "other"))


def test_keys_that_others_can_read_are_logged(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for text, mode, warned in ((KEY, 0o600, []), (KEY, 0o644, ["can read"])):
        file.write_text(text)
        file.chmod(mode)
        warnings = load(["--api-key-file", str(file)], {}, uid=0)[1]
        assert len(warnings) == len(warned)
        for warning, words in zip(warnings, warned, strict=True):
            assert words in warning
            assert text not in warning


def test_a_key_that_could_be_guessed_keeps_the_daemon_from_starting(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    for key, fits in (("k" * 15, False), ("k" * 16, True)):
        file.write_text(f"{KEY}\n{key}\n")
        file.chmod(0o600)
        for flags, environ in ((["--api-key-file", str(file)], {}), ([], {"VOLANT_API_KEY": key})):
            if fits:
                assert settings(*flags, **environ)
                continue
            with pytest.raises(SettingsError, match=r"15 characters.*at least 16.*openssl rand") as refused:
                settings(*flags, **environ)
            assert key not in str(refused.value)


def test_an_open_address_needs_access_control_or_insecure() -> None:
    with pytest.raises(SettingsError, match="--insecure"):
        settings("--listen", "0.0.0.0:7777")
    with pytest.raises(SettingsError, match="--insecure"):
        settings("--listen", "0.0.0.0:7777", "--trusted-proxies", "10.0.0.1")
    assert settings("--listen", "0.0.0.0:7777", "--insecure").insecure
    assert settings("--listen", "0.0.0.0:7777", VOLANT_API_KEY=KEY)
    assert settings("--listen", "[::]:7777", "--api-allow-cidr", "10.0.0.0/8, 2001:db8::/32")
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


@pytest.mark.parametrize(
    "text", ["", "65536", "65536-", "98303-65536", "0-99999", "65536-65540", "70000-4294967295", "a-b"]
)
def test_an_invalid_range_of_user_ids_is_an_error(text: str) -> None:
    with pytest.raises(SettingsError, match="vm_uids"):
        settings("--vm-uids", text)
    assert len(parse_uids(settings().vm_uids)) == 32768


def test_help_describes_every_flag(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["volantd", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        load(["--help"], {})
    assert ended.value.code == 0
    said = capsys.readouterr().out
    flags = dict(
        re.findall(r"^  (?:--listen(?: [A-Z]+)?, )?--([a-z0-9-]+)[^\n]*?(?:\n {10,}|  +)(\S[^\n]*)", said, re.MULTILINE)
    )
    grouped = [field for fields in GROUPS.values() for field in fields]
    assert sorted(grouped) == sorted(set(Settings.__struct_fields__) - {"api_key"})
    assert {field.replace("_", "-") for field in grouped} <= flags.keys()
    assert all(len(text) > 10 for text in flags.values())


OIDC = {"oidc_issuer": "https://login.example", "oidc_audience": "volar, ci", "oidc_roles": "groups=ops:admin"}


def test_an_issuer_has_audiences_and_roles() -> None:
    found = oidc_of(resolve(OIDC, {"HOME": "/h"})[0])
    assert found is not None
    assert (found.audiences, found.client_id, len(found.rules)) == (("volar", "ci"), "volar", 1)
    assert (found.browsers, found.client_secret) == (False, None)


def test_a_client_of_the_issuer_signs_browsers_in_and_may_have_a_secret(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    given = OIDC | {"oidc_client_id": "console", "oidc_client_secret_file": str(file)}
    with pytest.raises(SettingsError, match="secret can't be read: No such file"):
        resolve(given, {"HOME": "/h"})
    for text, mode, warned in (("a b\n", 0o600, False), ("other", 0o644, True)):
        file.write_text(text)
        file.chmod(mode)
        settings, warnings = resolve(given, {"HOME": "/h"})
        assert any("can read the secret in" in warning for warning in warnings) is warned
        found = oidc_of(settings)
        assert found is not None
        assert found.client_secret is not None
        assert (found.browsers, found.client_id, found.client_secret.reveal()) == (True, "console", text.strip())
        assert text.strip() not in repr(found)
    for text in ("", "one\ntwo"):
        file.write_text(text)
        with pytest.raises(SettingsError, match="has to contain one secret"):
            resolve(given, {"HOME": "/h"})
    with pytest.raises(SettingsError, match="needs oidc_issuer and oidc_client_id"):
        resolve(OIDC | {"oidc_client_secret_file": str(file)}, {"HOME": "/h"})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"oidc_issuer": "http://login.example"}, "is not a URL with https://"),
        ({"oidc_issuer": None}, "set without oidc_issuer"),
        ({"oidc_audience": None}, "needs oidc_audience"),
        ({"oidc_roles": None}, "needs oidc_audience"),
        ({"oidc_roles": "ops:admin"}, "oidc_roles: 'ops:admin' is not CLAIM=VALUE:ROLE"),
        ({"oidc_roles": "groups=a:user:web,sub=a:user,groups=a:user:db"}, "oidc_roles: 'groups=a' is there more than"),
    ],
)
def test_an_issuer_that_is_half_set_is_refused(changes: dict[str, str | None], words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)):
        resolve(OIDC | changes, {"HOME": "/h"})


def test_an_issuer_names_the_line_that_installs_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volant.identity._tokens.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=re.escape("pip install 'volant[oidc]'")):
        resolve(OIDC, {"HOME": "/h"})


def test_a_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 8)
    assert read_given(path, 8) == b"x" * 8
    with pytest.raises(UnreadableFile, match="is larger than 7 bytes"):
        read_given(path, 7)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnreadableFile, match="is not a regular file"):
        read_given(tmp_path / "pipe", 8)
    with pytest.raises(UnreadableFile, match=r"can't be read: Is a directory|is not a regular file"):
        read_given(tmp_path, 8)
    with pytest.raises(UnreadableFile, match="can't be read: No such file"):
        read_given(tmp_path / "none", 8)


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
