"""The file with the daemon's settings keeps what others have written, and has ours once."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from volant.cli import _setup
from volant.cli._run import Failure
from volant.cli._settings_file import SettingsFile, find

MINE = '# Mine: don\'t touch.\nmax_vms = 3\nallowed_hosts = [\n  "a.example",  # first\n]'
SETTINGS = {"fleet_host": "h1", "fleet_zone": 'a "b" \\ $c', "fleet_etcd": "https://[::1]:2379,https://b:2379"}


@pytest.mark.parametrize("end", ["", "\n"])
def test_toml_keeps_what_is_there(tmp_path: Path, end: str) -> None:
    path = tmp_path / "volantd.toml"
    path.write_text(MINE + end)
    path.chmod(0o640)
    file = SettingsFile(path, toml=True, service=False)
    assert file.write(file.candidate(SETTINGS))
    assert path.read_text().startswith(MINE + "\n")
    assert tomllib.loads(path.read_text()) == {"max_vms": 3, "allowed_hosts": ["a.example"], **SETTINGS}
    assert path.stat().st_mode & 0o777 == 0o640
    # Again, with others, and then not at all.
    again = SettingsFile(path, toml=True, service=False)
    assert not again.write(again.candidate(SETTINGS))
    assert again.write(again.candidate({"fleet_host": "h2"}))
    assert tomllib.loads(path.read_text())["fleet_host"] == "h2"
    assert "fleet_zone" not in path.read_text()
    assert again.write(again.candidate({}))
    assert path.read_text() == MINE + "\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("character", ["\u2028", "\u0085"])
@pytest.mark.parametrize(("toml", "name"), [(True, "fleet_zone"), (False, "VOLANT_FLEET_ZONE")])
def test_a_value_is_not_cut_where_only_python_has_an_end_of_a_line(
    tmp_path: Path, character: str, toml: bool, name: str
) -> None:
    path = tmp_path / "settings"
    mine = f'{name} = "a{character}b"\n' if toml else f'{name}="a{character}b"\n'
    path.write_text(mine)
    file = SettingsFile(path, toml=toml, service=False)
    file.write(file.candidate({"fleet_host": "h1"}))
    if not toml:
        assert file.environ(file.text)[name] == f"a{character}b"
    file.write(file.candidate({}))
    assert path.read_text() == mine


def test_variables_are_those_that_systemd_reads(tmp_path: Path) -> None:
    path, link = tmp_path / "real", tmp_path / "volantd"
    path.write_text("; Mine\nVOLANT_MAX_VMS=3\nOTHER='x y'\n")
    link.symlink_to(path)
    file = SettingsFile(link, toml=False, service=True)
    assert file.write(file.candidate(SETTINGS))
    assert link.is_symlink()
    text = path.read_text()
    assert text.startswith("; Mine\nVOLANT_MAX_VMS=3\nOTHER='x y'\n")
    assert 'VOLANT_FLEET_ZONE="a \\"b\\" \\\\ \\$c"\n' in text
    assert file.environ(text) == {"VOLANT_MAX_VMS": "3"} | {f"VOLANT_{k.upper()}": v for k, v in SETTINGS.items()}


def test_what_others_have_written_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "volantd.toml"
    path.write_text('fleet_zone = "a"\n')
    file = SettingsFile(path, toml=True, service=False)
    assert file.others("fleet_") == ["fleet_zone"]
    file.write(file.text.replace("fleet_zone", "log_level").replace('"a"', '"info"'))
    file.write(file.candidate(SETTINGS))
    assert file.others("fleet_") == []


def test_settings_that_would_land_in_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "volantd.toml"
    path.write_text("[table]\n")
    file = SettingsFile(path, toml=True, service=False)
    with pytest.raises(Failure, match="not closed"):
        file.candidate(SETTINGS)
    with pytest.raises(Failure, match="characters"):
        file.candidate({"fleet_zone": "a\nmax_vms = 1"})
    assert path.read_text() == "[table]\n"


def test_the_file_is_that_which_the_daemon_reads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VOLANT_CONFIG", raising=False)
    monkeypatch.setattr(_setup, "DIRECTORY", tmp_path)
    monkeypatch.setattr(_setup, "ENVIRONMENT", tmp_path / "default")
    with pytest.raises(Failure, match="no service"):
        find(None)
    (tmp_path / "volantd.service").touch()
    assert (find(None).path, find(None).toml, find(None).service) == (tmp_path / "default", False, True)
    (tmp_path / "default").write_text(f"VOLANT_CONFIG={tmp_path}/of-service.toml\n")
    assert (find(None).path, find(None).toml) == (tmp_path / "of-service.toml", True)
    monkeypatch.setenv("VOLANT_CONFIG", str(tmp_path / "of-shell.toml"))
    assert find(None).path == tmp_path / "of-shell.toml"
    named = find(str(tmp_path / "named.toml"))
    assert (named.path, named.service) == (tmp_path / "named.toml", False)
