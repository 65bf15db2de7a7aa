"""A real `volantd` serves TCP with TLS, takes renewed certificates, and knows clients by theirs."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import signal
import socket
import ssl
import stat
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from cryptography import x509

from tests.certificates import Authority
from tests.system.kit import Daemon
from volant.daemon import Settings
from volant.daemon._check._context import Context
from volant.daemon._check._service import tls as check_tls
from volant.daemon._settings import SettingsError, resolve
from volant.daemon._tls import load_certificate
from volant.host import Host

pytestmark = pytest.mark.programs

KEY = "key-0123456789abcdef"
WITHIN_S = 60.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


class Setup:
    """A daemon with TLS, and the files that it reads."""

    def __init__(self, tmp_path: Path, authority: Authority) -> None:
        self.authority = authority
        self.clients = Authority(tmp_path, "clients")
        self.certificate = authority.issue("localhost", file="server")
        self.config = tmp_path / "volantd.toml"
        self.daemon = Daemon(
            tmp_path / "cache", "--listen", f"127.0.0.1:0,unix:{tmp_path}/api.sock", "--config", str(self.config)
        )

    def configure(self, **settings: str) -> None:
        lines = {"tls_cert": str(self.certificate), **settings}
        self.config.write_text("".join(f"{name} = {value!r}\n" for name, value in lines.items()))

    def with_clients(self, subjects: str, **settings: str) -> None:
        self.configure(client_ca=str(self.clients.path), tls_subjects=subjects, **settings)

    def context(self, certificate: Path | None = None) -> ssl.SSLContext:
        return self.authority.client_context(certificate)

    def client(self, certificate: Path | None = None) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=self.daemon.base_url, verify=self.context(certificate), trust_env=False, timeout=WITHIN_S
        )

    async def reload(self, expected: str) -> None:
        before = self.daemon.log().count(expected)
        os.kill(self.daemon.pid, signal.SIGHUP)
        with trio.fail_after(WITHIN_S):
            while self.daemon.log().count(expected) == before:  # noqa: ASYNC110
                await trio.sleep(0.02)


@pytest.fixture
def setup(tmp_path: Path, authority: Authority) -> Iterator[Setup]:
    setup = Setup(tmp_path, authority)
    try:
        yield setup
    finally:
        setup.daemon.dispose()


def fingerprint(der: bytes) -> str:
    return hashlib.sha256(der).hexdigest()


def presented(address: str) -> str:
    host, _, port = address.removeprefix("https://").rpartition(":")
    return fingerprint(ssl.PEM_cert_to_DER_cert(ssl.get_server_certificate((host, int(port)), timeout=WITHIN_S)))


async def test_tcp_speaks_tls_and_the_socket_does_not(setup: Setup, tmp_path: Path) -> None:
    setup.configure()
    setup.daemon.start()
    assert setup.daemon.base_url.startswith("https://127.0.0.1:")
    async with setup.client() as client:
        info: dict[str, Any] = (await client.get("/api/v1/system/info")).raise_for_status().json()
    assert info["addresses"][0] == setup.daemon.base_url
    assert info["tls"]["fingerprint"] == presented(setup.daemon.base_url)
    assert info["tls"]["client_certificates"] is False
    transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "api.sock"))
    async with httpx.AsyncClient(base_url="http://localhost", transport=transport) as client:
        assert (await client.get("/healthz")).status_code == 200
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.get(setup.daemon.base_url.replace("https", "http") + "/healthz", timeout=WITHIN_S)
    assert (answer.status_code, "use https://" in answer.text) == (400, True)


async def test_a_reload_takes_a_renewed_certificate_and_keeps_the_old_one_if_it_is_bad(setup: Setup) -> None:
    setup.configure()
    setup.daemon.start()
    first = presented(setup.daemon.base_url)
    async with setup.client() as open_client:
        await open_client.get("/healthz")
        setup.authority.issue("localhost", file="server")
        await setup.reload("reloaded keys")
        second = presented(setup.daemon.base_url)
        assert first != second
        for data in ("", setup.authority.path.read_text(), "-----BEGIN CERTIFICATE-----\nAAAA\n"):
            setup.certificate.write_text(data)
            await setup.reload("the old settings stay, as the new ones can't be loaded: tls_cert")
            assert presented(setup.daemon.base_url) == second
        setup.certificate.unlink()
        await setup.reload("can't be read: No such file or directory")
        assert presented(setup.daemon.base_url) == second
        setup.config.write_text("")
        await setup.reload("TLS can't be switched on or off by a reload")
        assert (await open_client.get("/healthz")).status_code == 200


def test_a_self_signed_certificate_stays_the_same(setup: Setup, tmp_path: Path) -> None:
    setup.config.write_text("tls_self_signed = true\n")
    setup.daemon.start()
    path = setup.daemon.state_dir / "tls.pem"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = load_certificate(made(tls_self_signed=True, state_dir=setup.daemon.state_dir))
    assert again is not None
    assert (again.fingerprint, again.self_signed) == (presented(setup.daemon.base_url), True)


def failure(**settings: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        load_certificate(made(**settings))
    return str(caught.value)


def made(**settings: Any) -> Settings:
    given = {"state_dir": Path("/s"), "runtime_dir": Path("/r"), "cache_dir": Path("/c"), **settings}
    return Settings(**given)


def test_files_that_cannot_be_used_are_named(tmp_path: Path, authority: Authority) -> None:
    one, other = authority.issue("one"), authority.issue("other")
    assert "is not the key of the certificate in tls_cert" in failure(tls_cert=one, tls_key=other)
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(_encrypted(one))
    assert f"tls_key {encrypted} is encrypted" in failure(tls_cert=one, tls_key=encrypted)
    assert f"client_ca {tmp_path}/none can't be read" in failure(tls_cert=one, client_ca=tmp_path / "none")
    assert "is not a regular file" in failure(tls_cert=Path("/dev/null"))
    assert f"tls_key {authority.path} has no private key in PEM" in failure(tls_cert=one, tls_key=authority.path)
    assert "none is marked as a CA" in failure(tls_cert=one, client_ca=other)


def test_two_programs_that_make_a_certificate_write_into_files_of_their_own(tmp_path: Path) -> None:
    other = tmp_path / "tls.pem.part"
    other.write_text("another program's")
    assert load_certificate(made(tls_self_signed=True, state_dir=tmp_path)) is not None
    assert other.read_text() == "another program's"
    assert {path.name for path in tmp_path.iterdir()} == {"tls.pem", "tls.pem.part"}


def test_a_self_signed_certificate_has_the_names_of_its_hosts(tmp_path: Path) -> None:
    hosts = "web.example,db.example:7777,[fd00::1]:7777,[fd00::2],fd00::3,192.0.2.1:7777"
    assert load_certificate(made(tls_self_signed=True, state_dir=tmp_path, allowed_hosts=hosts)) is not None
    certificate = x509.load_pem_x509_certificate((tmp_path / "tls.pem").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    expected = {"localhost", socket.gethostname()[:60], "web.example", "db.example"}
    assert set(names.get_values_for_type(x509.DNSName)) == expected
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert addresses == {"127.0.0.1", "::1", "fd00::1", "fd00::2", "fd00::3", "192.0.2.1"}


def test_an_unknown_curve_is_named(tmp_path: Path, authority: Authority) -> None:
    known = authority.issue("known")
    strange = tmp_path / "strange.pem"
    strange.write_text(
        re.sub(r"-+BEGIN (.*?)-+\n.*?-+END \1-+\n", _on_unknown_curve, known.read_text(), flags=re.DOTALL)
    )
    assert f"tls_cert {strange} can't be used: Curve" in failure(tls_cert=strange, tls_key=known)
    assert f"tls_key {strange} can't be used: Curve" in failure(tls_cert=known, tls_key=strange)
    (finding,) = check_tls(Context(Host(), made(tls_cert=strange), tmp_path))
    assert finding.level == "fails"


def _on_unknown_curve(block: re.Match[str]) -> str:
    """Replaces the identifier of the curve P-256 in a block of PEM by one of the same length that nobody uses."""
    p256 = bytes.fromhex("06082a8648ce3d030107")
    der = base64.b64decode("".join(block[0].splitlines()[1:-1]))
    assert p256 in der
    data = base64.encodebytes(der.replace(p256, p256[:-1] + b"\x7f")).decode()
    return f"-----BEGIN {block[1]}-----\n{data}-----END {block[1]}-----\n"


def test_a_missing_key_is_named(tmp_path: Path, authority: Authority) -> None:
    missing = tmp_path / "none.pem"
    settings = {"tls_cert": authority.issue("one"), "tls_key": missing}
    assert failure(**settings) == f"tls_key {missing} can't be read: No such file or directory"
    (finding,) = check_tls(Context(Host(), made(**settings), tmp_path))
    assert finding.level == "fails"


def _encrypted(path: Path) -> bytes:
    from cryptography.hazmat.primitives import serialization

    key = serialization.load_pem_private_key(path.read_bytes(), None)
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tls_key": "/k"}, "tls_key is set without tls_cert"),
        ({"tls_cert": "/c", "tls_self_signed": True}, "exclude each other"),
        ({"client_ca": "/c", "tls_subjects": "CN=a:admin"}, "client_ca is set without TLS"),
        ({"tls_cert": "/c", "client_ca": "/c"}, "need each other"),
        ({"tls_cert": "/c", "tls_subjects": "CN=a:admin"}, "need each other"),
        ({"tls_cert": "/c", "client_ca": "/c", "tls_subjects": "ci:admin"}, "'ci:admin' is not CN=NAME:ROLE"),
        ({"tls_cert": "/c", "client_ca": "/c", "tls_subjects": "OU=ci:admin"}, "begins with none of CN=, DNS="),
        ({"tls_cert": "/c", "client_ca": "/c", "tls_subjects": "CN=ci:operator:admin"}, "can be read in two ways"),
        ({"tls_cert": "/c", "client_ca": "/c", "tls_subjects": "CN=a:admin:web"}, "an admin has all projects"),
        (
            {"tls_cert": "/c", "client_ca": "/c", "tls_subjects": "CN=a:viewer:web,CN=b:user,CN=a:admin"},
            "tls_subjects: 'CN=a' is there more than once",
        ),
        ({"tls_cert": "c.pem"}, "tls_cert c.pem is not an absolute path"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(words)):
        resolve(settings, {"HOME": "/h"})


def test_systemd_passes_the_files(tmp_path: Path) -> None:
    for name in ("volant-tls-cert", "volant-tls-key"):
        (tmp_path / name).touch()
    settings, _ = resolve({}, {"HOME": "/h", "CREDENTIALS_DIRECTORY": str(tmp_path)})
    assert (settings.tls_cert, settings.tls_key) == (tmp_path / "volant-tls-cert", tmp_path / "volant-tls-key")


def test_a_certificate_that_expires_is_reported_in_time(tmp_path: Path, authority: Authority) -> None:
    now = datetime.now(UTC)
    lasting = load_certificate(made(tls_cert=authority.issue("lasting", days=90)))
    short = load_certificate(made(tls_cert=authority.issue("short", days=1)))
    assert lasting is not None
    assert short is not None
    assert lasting.trouble(now) is None
    assert "expires on" in str(lasting.trouble(now + timedelta(days=80)))
    assert "expired on" in str(lasting.trouble(now + timedelta(days=91)))
    # A third of its 3 days.
    assert short.trouble(now - timedelta(hours=1)) is None
    assert "expires on" in str(short.trouble(now + timedelta(hours=1)))

    def level(**settings: Any) -> str:
        (finding,) = check_tls(Context(Host(), made(**settings), tmp_path))
        assert (finding.level == "less") == ("restart it if the certificate is a systemd credential" in finding.advice)
        return finding.level

    assert level(tls_cert=authority.issue("old", days=-1)) == "less"
    assert level(tls_cert=authority.issue("new")) == "ok"
    assert level(tls_cert=tmp_path / "none") == "fails"
    assert level(tls_self_signed=True, state_dir=tmp_path) == "ok"
    assert check_tls(Context(Host(), made(), tmp_path)) == []


async def test_the_log_warns_of_a_certificate_that_expires(setup: Setup) -> None:
    setup.certificate = setup.authority.issue("localhost", days=0.01)
    setup.configure()
    setup.daemon.start()
    with trio.fail_after(WITHIN_S):
        while "the TLS certificate expires on" not in setup.daemon.log():  # noqa: ASYNC110
            await trio.sleep(0.02)


async def test_a_client_certificate_is_a_caller_with_a_role(setup: Setup) -> None:
    setup.with_clients("CN=watcher:viewer,URI=spiffe://example/ci:operator,CN=boss:admin")
    setup.daemon.start()
    issue = setup.clients.issue
    watcher, boss = issue("watcher", client=True), issue("boss", client=True)
    ci = issue("anything", client=True, uris=("spiffe://example/ci",))
    stranger = issue("stranger", client=True)
    body = {"name": "one", "plugin": "none"}
    for certificate, listed, created, secret in (
        (watcher, 200, 403, 403), (ci, 200, 404, 403), (boss, 200, 404, 200), (stranger, 401, 401, 401),
    ):  # fmt: skip
        async with setup.client(certificate) as client:
            assert (await client.get("/api/v1/vms")).status_code == listed
            assert (await client.post("/api/v1/vms", json=body)).status_code == created
            assert (await client.get("/api/v1/system/tasks")).status_code == secret
    # No key would do, so without a certificate there is not even an answer.
    with pytest.raises(httpx.TransportError):
        async with setup.client() as client:
            await client.get("/healthz")
    assert "tls:CN=boss" in setup.daemon.log()


async def test_with_a_key_in_force_a_certificate_is_optional(setup: Setup) -> None:
    setup.with_clients("CN=boss:admin", api_key=KEY)
    setup.daemon.start()
    boss, stranger = (setup.clients.issue(name, client=True) for name in ("boss", "stranger"))
    key = {"X-Volant-API-Key": KEY}
    for certificate, headers, expected in (
        (None, {}, 401), (None, key, 200), (boss, {}, 200), (boss, {"X-Volant-API-Key": "wrong"}, 401),
        (stranger, {}, 401), (stranger, key, 200),
    ):  # fmt: skip
        async with setup.client(certificate) as client:
            assert (await client.get("/api/v1/vms", headers=headers)).status_code == expected
    strange = Authority(setup.config.parent, "strange").issue("boss", client=True, file="false-boss")
    with pytest.raises(httpx.TransportError):
        async with setup.client(strange) as client:
            await client.get("/api/v1/vms", headers=key)


async def test_a_removed_subject_or_authority_is_refused_at_once(setup: Setup) -> None:
    setup.with_clients("CN=boss:admin,CN=ci:operator", api_key=KEY)
    setup.daemon.start()
    async with (
        setup.client(setup.clients.issue("boss", client=True)) as boss,
        setup.client(setup.clients.issue("ci", client=True)) as ci,
        boss.stream("GET", "/api/v1/events/vms") as bosses,
        ci.stream("GET", "/api/v1/events/vms") as events,
    ):
        assert (bosses.status_code, events.status_code) == (200, 200)
        setup.with_clients("CN=boss:admin", api_key=KEY)
        await setup.reload("reloaded keys")
        with trio.fail_after(WITHIN_S):
            await events.aread()
        assert (await ci.get("/api/v1/vms")).status_code == 401
        assert (await boss.get("/api/v1/vms")).status_code == 200
        setup.configure(client_ca=str(setup.authority.path), tls_subjects="CN=boss:admin", api_key=KEY)
        await setup.reload("reloaded keys")
        with pytest.raises(httpx.TransportError), trio.fail_after(WITHIN_S):
            await bosses.aread()
        with pytest.raises(httpx.TransportError):
            await boss.get("/api/v1/vms")
