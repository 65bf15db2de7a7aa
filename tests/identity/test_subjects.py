"""Callers with a client certificate."""

from __future__ import annotations

import time

import pytest
import trio

from volant.http import Access, ApiSettings, parse_subject
from volant.http._subjects import Subjects
from volant.http._tls import ClientCertificate


async def test_what_is_open_ends_with_its_certificate_and_with_its_role(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ApiSettings(subjects=(parse_subject("CN=ci:operator:web"),))
    access = Access(settings)
    expires_at = time.time() + 60
    caller = Subjects(settings.subjects).caller(ClientCertificate(("CN=other", "CN=ci"), expires_at), "192.0.2.1")
    assert caller is not None
    assert (caller.name, caller.project) == ("tls:CN=ci", "web")
    with access.running.add(caller, trio.Event()) as ending:
        access.replace(settings)
        assert not ending.is_set()
        access.replace(ApiSettings(subjects=(parse_subject("CN=ci:viewer:web"),)))
        assert ending.reason == "the role of the certificate was changed or removed"
    access.replace(settings)
    with access.running.add(caller, trio.Event()) as ending:
        access.recheck()
        assert not ending.is_set()
        monkeypatch.setattr("time.time", lambda: expires_at + 1)
        access.recheck()
        assert ending.reason == "the client certificate has expired"
