"""Client certificates: which of their names has which role."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from volant.model import Caller, Role, parse_role_grant

from ._tls import ClientCertificate

_KINDS = ("CN", "DNS", "URI", "EMAIL")
PREFIX = "tls:"
"""Begins the names and the credentials of callers with a certificate."""


class Subject(msgspec.Struct, frozen=True):
    """A name in certificates, and what a client with it may do."""

    name: str
    """`CN=ci`, `DNS=ci.example`, `URI=spiffe://example/ci` or `EMAIL=ci@example`."""
    role: Role
    project: str | None
    """None: all projects."""

    @property
    def credential(self) -> str:
        """What the credential of its callers begins with: another text if the role or the project changes."""
        return f"{PREFIX}{self.name}:{self.role}:{self.project or ''}"


def parse_subject(text: str) -> Subject:
    """Parses `NAME:ROLE` or `NAME:ROLE:PROJECT`; the name may have colons.

    :raises ValueError: it is neither, or can be read as both; the text is meant for people.
    """
    grant = parse_role_grant(text, form="CN=NAME", example="CN=ci:operator:web")
    if grant.key not in _KINDS:
        raise ValueError(f"{text.strip()[:200]!r} begins with none of {'=, '.join(_KINDS)}=")
    return Subject(f"{grant.key}={grant.value}", grant.role, grant.project)


class Subjects:
    """The subjects in force. Without any, certificates say nothing."""

    def __init__(self, subjects: Iterable[Subject]) -> None:
        self._by_name = {subject.name: subject for subject in subjects}
        self._credentials = {subject.credential for subject in self._by_name.values()}

    def __bool__(self) -> bool:
        return bool(self._by_name)

    @property
    def has_administrator(self) -> bool:
        """Whether one of them is an administrator."""
        return any(subject.role is Role.ADMIN for subject in self._by_name.values())

    def find(self, certificate: ClientCertificate) -> Subject | None:
        """Returns the subject of a certificate: that of its first name that has one; None if it has none or has
        expired."""
        if certificate.is_expired:
            return None
        return next((self._by_name[name] for name in certificate.names if name in self._by_name), None)

    def caller(self, certificate: ClientCertificate, address: str) -> Caller | None:
        """Returns the caller that has shown a certificate; None if no subject is in it."""
        subject = self.find(certificate)
        if subject is None:
            return None
        name = f"{PREFIX}{subject.name}"
        credential = f"{subject.credential} {certificate.expires_at:.0f}"
        return Caller(name, name, subject.role, subject.project, address, credential, limited=True)

    def ended(self, credential: str) -> str | None:
        """Returns why the certificate of a caller is not valid any more; None: it is valid."""
        subject, _, expires_at = credential.rpartition(" ")
        if time.time() >= float(expires_at):
            return "the client certificate has expired"
        return None if subject in self._credentials else "the role of the certificate was changed or removed"
