"""TLS as other people's programs see it: Debian's testssl.sh finds no weakness, and OpenSSL's client no way around."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.system.kit import Daemon

pytestmark = pytest.mark.programs

KEY = "key-0123456789abcdef"
SCAN_S = 1500.0
CLIENT_S = 60.0

NOT_OURS = {
    # This host's program has no GOST, and the resumption of sessions has a test of its own in tests/api/test_tls.py.
    *("engine_problem", "sessionresumption_ticket"),
    # Of the authority of the tests, and of the DNS, which loopback has none of.
    *("cert_revocation", "DNS_CAArecord"),
    # It would force TLS on all services under the host's name, not only on ours.
    "HSTS",
}


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("clients"), "clients")


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, authority: Authority, clients: Authority) -> Iterator[Daemon]:
    """A daemon that asks for certificates of clients."""
    daemon = Daemon(
        tmp_path_factory.mktemp("cache"),
        *("--tls-cert", str(authority.issue("localhost", days=90))),
        *("--client-ca", str(clients.path), "--tls-subjects", "CN=boss:admin"),
    )
    daemon.start()
    try:
        yield daemon
    finally:
        daemon.dispose()


@pytest.fixture
def testssl() -> str:
    """Returns the path of the scanner. Debian calls it `testssl`, its authors `testssl.sh`."""
    program = shutil.which("testssl") or shutil.which("testssl.sh")
    if program is None:
        pytest.skip("testssl.sh is not installed")
    return program


@pytest.mark.full
@pytest.mark.slow
def test_testssl_finds_no_weakness(tmp_path: Path, authority: Authority, testssl: str) -> None:
    daemon = Daemon(tmp_path / "cache", "--tls-cert", str(authority.issue("localhost", days=90, file="scanned")))
    report = tmp_path / "report.json"
    daemon.start()
    try:
        done = subprocess.run(
            [
                testssl, "--quiet", "--color", "0", "--warnings", "off", "--add-ca", authority.path,
                "--jsonfile", report,
                "--protocols", "--std", "--server-preference", "--fs", "--server-defaults", "--headers", "--vulnerable",
                daemon.base_url.removeprefix("https://"),
            ],
            capture_output=True, text=True, timeout=SCAN_S, check=False, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    finally:
        daemon.dispose()
    findings = json.loads(report.read_text())
    found = {finding["id"]: finding["finding"] for finding in findings}
    assert found["TLS1_2"].startswith("offered"), done.stdout
    assert found["TLS1_3"].startswith("offered")
    assert [found[version] for version in ("SSLv2", "SSLv3", "TLS1", "TLS1_1")] == ["not offered"] * 4
    assert "not vulnerable" in found["secure_client_renego"]
    bad = {
        finding["id"]: finding["finding"]
        for finding in findings
        if finding["severity"] not in ("OK", "INFO") and finding["id"] not in NOT_OURS
    }
    assert not bad


def s_client(daemon: Daemon, *options: str | Path, said: str = "") -> subprocess.CompletedProcess[str]:
    """Runs OpenSSL's client until the server ends the connection."""
    return subprocess.run(
        ["openssl", "s_client", "-ign_eof", "-connect", daemon.base_url.removeprefix("https://"), *options],
        input=said, capture_output=True, text=True, timeout=CLIENT_S, check=False, env=os.environ | {"LC_ALL": "C"},
    )  # fmt: skip


GET = "GET /api/v1/vms HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_a_client_with_a_certificate_is_served(daemon: Daemon, clients: Authority, version: str) -> None:
    boss = clients.issue("boss", client=True)
    answer = s_client(daemon, version, "-cert", boss, said=GET)
    assert "HTTP/1.1 200" in answer.stdout
    assert "Secure Renegotiation IS supported" in answer.stdout or version == "-tls1_3"
    assert "Compression: NONE" in answer.stdout


@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_a_client_without_a_valid_certificate_is_not(
    daemon: Daemon, clients: Authority, tmp_path: Path, version: str
) -> None:
    strangers = Authority(tmp_path, "strangers")
    for options, alert in (
        ((), "certificate required" if version == "-tls1_3" else "handshake failure"),
        (("-cert", strangers.issue("boss", client=True)), "unknown ca"),
        (("-cert", clients.issue("late", client=True, days=-1)), "certificate expired"),
        (("-cert", clients.issue("server")), "unsupported certificate"),
    ):
        answer = s_client(daemon, version, *options, said=GET)
        assert "HTTP/1.1" not in answer.stdout
        assert f"alert {alert}" in answer.stderr, answer.stderr
    stranger = s_client(daemon, version, "-cert", clients.issue("stranger", client=True), said=GET)
    assert "HTTP/1.1 401" in stranger.stdout


@pytest.mark.parametrize("version", ["-tls1", "-tls1_1"])
def test_old_versions_are_refused(daemon: Daemon, version: str) -> None:
    answer = s_client(daemon, version, "-cipher", "ALL:@SECLEVEL=0")
    assert answer.returncode != 0
    assert "protocol version" in answer.stderr


def test_the_client_cannot_renegotiate(daemon: Daemon, clients: Authority) -> None:
    boss = clients.issue("boss", client=True)
    # Without -ign_eof a line `R` asks for it.
    answer = subprocess.run(
        ["openssl", "s_client", "-tls1_2", "-cert", boss, "-connect", daemon.base_url.removeprefix("https://")],
        input="R\n", capture_output=True, text=True, timeout=CLIENT_S, check=False,
    )  # fmt: skip
    assert "RENEGOTIATING" in answer.stdout + answer.stderr
    assert "no renegotiation" in answer.stderr
