"""Of a host's apt configuration only addresses of Debian's archive and transport settings are used."""

from __future__ import annotations

from pathlib import Path

import pytest

from volant.images import ImageError, _apt, _sources
from volant.images._sources import Source, parse_deb822, parse_one_line, transport_settings

M = "http://mirror.example/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def stanza(**changes: str) -> str:
    fields = {"Types": "deb", "URIs": M, "Suites": "trixie", "Components": "main", "Signed-By": KEYRING} | changes
    return "".join(f"{name.replace('_', '-')}: {value}\n" for name, value in fields.items() if value)


@pytest.mark.parametrize(
    ("text", "suites"),
    [
        (stanza(), ["trixie"]),
        (stanza(Suites="trixie trixie-updates trixie-security"), ["trixie", "trixie-updates", "trixie-security"]),
        (stanza(Suites="bookworm bookworm-security"), ["trixie", "trixie-security"]),
        (stanza(Suites="stable"), ["trixie"]),
        (stanza(Types="deb deb-src", Components="contrib main"), ["trixie"]),
        (
            "# a comment\n" + stanza(Architectures="amd64 arm64") + "\n\n" + stanza(URIs="https://b.example/x"),
            ["trixie"] * 2,
        ),
        (stanza(Suites="\n trixie\n trixie-updates"), ["trixie", "trixie-updates"]),
        (stanza(**{"Signed-By": ""}), ["trixie"]),
        (stanza(Trusted="yes"), []),
        (stanza(Trusted="no"), []),
        (stanza(Suites="./"), []),
        (stanza(Suites="trixie-backports trixie-proposed-updates noble"), []),
        (stanza(Components="stable"), []),
        (stanza(Components="contrib non-free"), []),
        (stanza(Types="deb-src"), []),
        (stanza(Enabled="no"), []),
        (stanza(Architectures="arm64"), []),
        (stanza(URIs="cdrom:[Debian]/"), []),
        (stanza(**{"Signed-By": "/etc/apt/keyrings/vendor.gpg"}), []),
        (stanza(**{"Signed-By": f"{KEYRING} /etc/apt/keyrings/vendor.gpg"}), []),
        (stanza(**{"Signed-By": "\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n abc"}), []),
        ("", []),
        ("nonsense without a colon\n", []),
    ],
)
def test_deb822_files_are_parsed(text: str, suites: list[str]) -> None:
    assert [source.suite for source in parse_deb822(text)] == suites


@pytest.mark.parametrize(
    ("text", "suites"),
    [
        (f"deb {M} trixie main contrib # here", ["trixie"]),
        (f"deb [arch=amd64 signed-by={KEYRING}] {M} trixie-security main", ["trixie-security"]),
        (f"deb [ arch=amd64,i386 ] {M} bookworm-updates main", ["trixie-updates"]),
        (f"deb [trusted=yes] {M} trixie main", []),
        (f"deb [allow-insecure=yes trusted=yes] {M} trixie main", []),
        (f"deb [signed-by=/etc/apt/keyrings/vendor.gpg] {M} trixie main", []),
        (f"deb [arch=arm64] {M} trixie main", []),
        ("deb https://download.example/linux/debian trixie stable", []),
        ("deb file:/srv/own ./", []),
        (f"# deb {M} trixie main", []),
        (f"deb-src {M} trixie main", []),
        (f"deb [unclosed {M} trixie main", []),
    ],
)
def test_one_line_files_are_parsed(text: str, suites: list[str]) -> None:
    assert [source.suite for source in parse_one_line(text)] == suites


def test_the_signature_must_be_debians() -> None:
    line = Source(M, "trixie").line(Path(KEYRING))
    assert line == f"deb [arch=amd64 signed-by={KEYRING}] {M} trixie main"


def test_foreign_sources_are_ignored(tmp_path: Path) -> None:
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (tmp_path / "sources.list").write_text(f"deb {M} trixie main\n")
    (parts / "debian.sources").write_text(stanza(Suites="trixie trixie-updates"))
    (parts / "decoy.sources").write_text(stanza(URIs="file:/usr/share/decoy", Suites="./", Trusted="yes"))
    (parts / "saved.sources.save").write_text(stanza(URIs="https://old.example/debian"))
    assert _sources.host_sources(tmp_path) == [Source(M, "trixie"), Source(M, "trixie-updates")]


def test_a_host_without_apt_has_no_sources(tmp_path: Path) -> None:
    assert _sources.host_sources(tmp_path / "none") == []


def test_a_mirror_can_be_named() -> None:
    assert [source.suite for source in _sources.explicit_sources(M, M + "-security")] == [
        "trixie",
        "trixie-updates",
        "trixie-security",
    ]
    for bad in ("debian.example", "http://x y/", 'http://x"/', "ftp://x/"):
        with pytest.raises(ImageError) as caught:
            _sources.explicit_sources(bad, None)
        assert caught.value.code == "bad_mirror"
        assert caught.value.hint


def test_only_transport_settings_are_used() -> None:
    dump = """
APT::Default-Release "sid";
Acquire::http::Proxy "http://proxy.example:3128";
Acquire::https::CaInfo "/etc/ssl/own.pem";
Acquire::http::Proxy::internal.example "DIRECT";
Acquire::https::Verify-Peer "";
Acquire::AllowInsecureRepositories "1";
DPkg::Post-Invoke:: "rm -rf /";
APT::Update::Post-Invoke:: "rm -rf /";
Dir::Bin::gpg "/bin/true";
Acquire::http::Proxy-Auto-Detect "/usr/bin/auto";
"""
    assert transport_settings(dump) == [
        ("Acquire::http::Proxy", "http://proxy.example:3128"),
        ("Acquire::https::CaInfo", "/etc/ssl/own.pem"),
        ("Acquire::http::Proxy::internal.example", "DIRECT"),
        ("Acquire::http::Proxy-Auto-Detect", "/usr/bin/auto"),
    ]


def test_the_private_apt_reads_no_settings_of_the_host(tmp_path: Path) -> None:
    """As apt itself reports: its own files, no preferences, no hooks."""
    apt = _apt.Apt(tmp_path / "apt", [Source(M, "trixie")], Path(KEYRING))
    done = apt._run(["apt-config", "dump"], 30)
    assert done.returncode == 0, done.stderr
    lines = dict(line.rstrip(";").split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    assert "Post-Invoke" not in done.stdout
    assert lines["Dir::State::lists"] == f'"{tmp_path}/apt/state/lists"'
    assert lines["Dir::Etc::preferencesparts"] == '"/dev/null"'
    assert lines["APT::Get::AllowUnauthenticated"] == '"false"'
    assert lines["Acquire::AllowInsecureRepositories"] == '"false"'
