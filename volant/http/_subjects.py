"""Client certificates and the roles of their names."""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec

from volant.model import Caller, Role, parse_role_grant

from ._tls import ClientCertificate

_KINDS = ("CN", "DNS", "URI", "EMAIL")
PREFIX = "tls:"
"""The prefix of the names and the credentials of callers with a certificate."""


class Subject(msgspec.Struct, frozen=True):
    """A name in certificates, and the role of clients with it."""

    name: str
    """`CN=ci`, `DNS=ci.example`, `URI=spiffe://example/ci` or `EMAIL=ci@example`."""
    role: Role
    project: str | None
    """None for all projects."""

    @property
    def credential(self) -> str:
        """The start of its callers' credentials, which changes with the role or the project."""
        return f"{PREFIX}{self.name}:{self.role}:{self.project or ''}"


def parse_subject(text: str) -> Subject:
    """Parses `NAME:ROLE` or `NAME:ROLE:PROJECT`; the name may have colons.

    :raises ValueError: the text has neither form, or fits both; the message is meant for people.
    """
    grant = parse_role_grant(text, form="CN=NAME", example="CN=ci:operator:web")
    if grant.key not in _KINDS:
        raise ValueError(f"{text.strip()[:200]!r} begins with none of {'=, '.join(_KINDS)}=")
    return Subject(f"{grant.key}={grant.value}", grant.role, grant.project)


class Subjects:
    """The subjects of the settings. Without any, certificates are ignored."""

    def __init__(self, subjects: Iterable[Subject]) -> None:
        self._by_name = {subject.name: subject for subject in subjects}
        self._credentials = {subject.credential for subject in self._by_name.values()}

    def __bool__(self) -> bool:
        return bool(self._by_name)

    @property
    def has_administrator(self) -> bool:
        """Whether one of the subjects is an administrator."""
        return any(subject.role is Role.ADMIN for subject in self._by_name.values())

    def find(self, certificate: ClientCertificate) -> Subject | None:
        """Returns the subject of a certificate, by its first name that has one; None if no name has one, or it has
        expired."""
        if certificate.is_expired:
            return None
        return next((self._by_name[name] for name in certificate.names if name in self._by_name), None)

    def caller(self, certificate: ClientCertificate, address: str) -> Caller | None:
        """Returns the caller that has presented a certificate; None if it has no subject."""
        subject = self.find(certificate)
        if subject is None:
            return None
        name = f"{PREFIX}{subject.name}"
        credential = f"{subject.credential} {certificate.expires_at:.0f}"
        return Caller(name, name, subject.role, subject.project, address, credential, limited=True)

    def ended(self, credential: str) -> str | None:
        """Returns why the certificate of a caller is not valid any more; None if it is valid."""
        subject, _, expires_at = credential.rpartition(" ")
        if time.time() >= float(expires_at):
            return "the client certificate has expired"
        return None if subject in self._credentials else "the role of the certificate was changed or removed"
