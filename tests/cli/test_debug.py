"""`volar debug bundle` without a daemon: what it gathers, how large it gets, and that no secret is in it."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from volant.cli import _bundle
from volant.cli._scrub import REMOVED, Scrub
from volant.cli._volar import volar

SECRETS = {name: f"hush-{name}-c0ffee" for name in (
    "environment", "file", "defaults", "config", "credstore", "bearer", "query", "ticket", "header", "userinfo", "json",
    "password", "flag", "cookie", "pem", "registry",
)}  # fmt: skip

LOG = f"""2026-01-02 03:04:05,678 INFO    volant.api: abc GET /api/v1/vms 200 1.0 ms
GET /api/v1/events/vms?since=0&api_key={SECRETS["query"]} HTTP/1.1
GET /ws/v1/vms/demo/devtools/browser?ticket={SECRETS["ticket"]}
Authorization: Bearer {SECRETS["bearer"]}
X-Volant-API-Key: {SECRETS["header"]}
Volant-Registry-Auth: {SECRETS["registry"]}
Cookie: a=b; session={SECRETS["cookie"]}
can't fetch https://me:{SECRETS["userinfo"]}@mirror.example/rootfs.ext4: 403
{{"db_password": "{SECRETS["json"]}", "size": 5}}
started with DB_PASSWORD=a,b;{SECRETS["password"]} and --api-key {SECRETS["flag"]}
the key in use is {SECRETS["environment"]}, or {SECRETS["file"]}, or {SECRETS["defaults"]} {SECRETS["credstore"]}
it was {SECRETS["config"]}
-----BEGIN PRIVATE KEY-----
{SECRETS["pem"]}
-----END PRIVATE KEY-----
VM demo: crashed: the last line
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Secrets at all places that there are; the directory of it."""
    files = {
        "keys": f"# of this host\n{SECRETS['file']}\n",
        "volantd": f"VOLANT_MAX_VMS=7\nVOLANT_API_KEY='{SECRETS['defaults']}'\nVOLANT_CONFIG={tmp_path}/volant.toml\n",
        "volant.toml": f'api_key = "{SECRETS["config"]}"\nlog_level = "debug"\n',
        "credential": f"{SECRETS['credstore']}\n",
        "log": LOG,
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(_bundle, "_ENVIRONMENT_FILE", tmp_path / "volantd")
    monkeypatch.setattr(_bundle, "_CREDENTIALS", (tmp_path / "credential",))
    monkeypatch.setattr(_bundle, "_DIRECTORIES", (tmp_path,))
    monkeypatch.setenv("VOLANT_API_KEY", SECRETS["environment"])
    monkeypatch.setenv("VOLANT_API_KEY_FILE", str(tmp_path / "keys"))
    monkeypatch.setenv("VOLANT_API_BASE", f"unix:{tmp_path}/nobody.sock")
    return tmp_path


def debug(*words: str) -> Result:
    return CliRunner().invoke(volar, ["debug", "bundle", *words], standalone_mode=False)


def members(path: Path) -> dict[str, str]:
    with tarfile.open(path) as tar:
        found = {}
        for member in tar.getmembers():
            file = tar.extractfile(member)
            assert file is not None
            found[member.name.partition("/")[2]] = file.read().decode()
    return found


def test_no_secret_is_in_the_bundle_wherever_one_was(host: Path) -> None:
    done = debug("--output", str(host / "b.tar.gz"), "--log", str(host / "log"))
    assert done.return_value == 0, done.stderr
    found = members(host / "b.tar.gz")
    for name, secret in SECRETS.items():
        assert [member for member, text in found.items() if secret in text] == [], name
        assert secret not in done.stdout + done.stderr
    # What one looks for is.
    for line in ("INFO    volant.api: abc GET /api/v1/vms 200 1.0 ms", "mirror.example/rootfs.ext4: 403", '"size": 5',
                 "VM demo: crashed: the last line"):  # fmt: skip
        assert line in found["log.txt"]
    settings = json.loads(found["settings.json"])
    assert settings["environment"]["VOLANT_API_KEY"] == REMOVED
    assert settings["environment"]["VOLANT_API_KEY_FILE"] == str(host / "keys")
    assert settings[str(host / "volantd")]["VOLANT_MAX_VMS"] == "7"
    assert settings[str(host / "volant.toml")] == {"api_key": REMOVED, "log_level": "debug"}


def test_without_a_daemon_the_bundle_has_the_data_of_the_host_and_names_what_is_missing(host: Path) -> None:
    done = debug("--output", str(host / "b.tar.gz"))
    assert done.return_value == 0, done.stderr
    assert "missing: daemon: " in done.stderr
    found = members(host / "b.tar.gz")
    assert {"README.txt", "versions.json", "host.txt", "settings.json", "files.txt"} <= set(found)
    assert "daemon: the daemon can't be reached" in found["README.txt"]
    assert "msgspec" in json.loads(found["versions.json"])
    assert "MemTotal" in found["host.txt"]
    assert str(host / "keys") in found["files.txt"]
    assert (host / "b.tar.gz").stat().st_mode & 0o777 == 0o600


def test_an_existing_file_is_not_overwritten(host: Path) -> None:
    (host / "b.tar.gz").write_text("mine")
    done = debug("--output", str(host / "b.tar.gz"))
    assert done.return_value == 4
    assert (host / "b.tar.gz").read_text() == "mine"
    assert isinstance(debug("--log", str(host / "none")).exception, click.UsageError)


def test_the_bundle_stays_small_whatever_is_in_the_log(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bundle, "MEMBER_BYTES", 256 * 1024)
    lines = [word * (20_000 // len(word)) for word in ("a.b-", "key", "--", "?a", "://", "basic ", "-----BEGIN ")]
    (host / "log").write_text("\n".join(lines * 4) + "the end\n")
    done = debug("--output", str(host / "b.tar.gz"), "--log", str(host / "log"))
    assert done.return_value == 0, done.stderr
    log = members(host / "b.tar.gz")["log.txt"]
    assert len(log) <= _bundle.MEMBER_BYTES
    assert log.endswith("the end\n")


def test_the_size_of_the_bundle_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bundle, "TOTAL_BYTES", 1000)
    bundle = _bundle.Bundle(Scrub())
    bundle.text("one", "x" * 800)
    bundle.text("two", "x" * 800)
    bundle.text("three", "x" * 100)
    assert list(bundle.members) == ["one", "three"]
    assert "two" in bundle.missing


def test_free_text_is_removed_from_documents_and_they_stay_documents() -> None:
    scrubbed = Scrub(["s3cret"]).document(
        {
            "labels": {"team": "s", "owner": "t"},
            "kernel_cmdline": "quiet token=x",
            "reason": {"code": "guest_panicked", "message": "of s3cret", "console": ["line"]},
            "process": {"boot_key": "7.1", "pid": 5},
            "api_key_file": "/etc/keys",
        }
    )
    assert scrubbed == {
        "labels": {"team": REMOVED, "owner": REMOVED},
        "kernel_cmdline": REMOVED,
        "reason": {"code": "guest_panicked", "message": f"of {REMOVED}", "console": REMOVED},
        "process": {"boot_key": REMOVED, "pid": 5},
        "api_key_file": "/etc/keys",
    }
