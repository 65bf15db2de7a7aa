"""Credentials for registries come from the files and helpers of Docker. Only those of the image's registry are sent."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.client.kit import answer, serving

from .kit import volar
from .test_images import image_view


@asynccontextmanager
async def helper(directory: Path, script: str) -> AsyncIterator[dict[str, str]]:
    """An environment with a credential helper named `test`."""
    program = directory / "docker-credential-test"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    yield {"PATH": f"{directory}:{os.environ['PATH']}"}


async def auth_sent(image: str, environ: dict[str, str], *words: str) -> Any:
    """Returns the credentials that `volar images pull` sends for an image; None: none."""
    async with serving() as server:
        server.routes["GET /api/v1/images/pulls"] = answer([])
        server.routes["POST /api/v1/images/pull"] = answer(image_view())
        done = await volar(server, "images", "pull", *words, image, environ=environ)
        assert done.code == 0, done.err
        (asked,) = server.asked("/api/v1/images/pull")
    header = asked.headers.get("volant-registry-auth")
    return None if header is None else json.loads(base64.b64decode(header))


async def test_credentials_are_those_of_the_images_registry(tmp_path: Path) -> None:
    (tmp_path / ".docker").mkdir()
    config = tmp_path / ".docker" / "config.json"
    config.write_text(
        json.dumps(
            {
                "auths": {
                    "registry.test:5000": {"auth": "b3VyczpwYXNz"},
                    "registry.test:5000/team": {"auth": "dGVhbTpwYXNz"},
                    "https://other.test/v2/": {"auth": "b3RoZXI6cGFzcw=="},
                },
                "unknown": {},
            }
        )
    )
    home = {"HOME": str(tmp_path)}
    assert await auth_sent("registry.test:5000/app", home) == {
        "auths": {"registry.test:5000": {"auth": "b3VyczpwYXNz"}}
    }
    assert await auth_sent("registry.test:5000/team/app", home) == {
        "auths": {"registry.test:5000": {"auth": "dGVhbTpwYXNz"}}
    }
    assert await auth_sent("other.test/app", home) == {"auths": {"other.test": {"auth": "b3RoZXI6cGFzcw=="}}}
    for without in ("python", "third.test/app", "oci:/nowhere", "index.registry.test:5000/app"):
        assert await auth_sent(without, home) is None
    named = tmp_path / "named.json"
    named.write_text(json.dumps({"auths": {"third.test": {"username": "me", "password": "pass"}}}))
    expected = {"auths": {"third.test": {"username": "me", "password": "pass"}}}
    assert await auth_sent("third.test/app", home | {"REGISTRY_AUTH_FILE": str(named)}) == expected
    assert await auth_sent("third.test/app", home, "--authfile", str(named)) == expected
    assert await auth_sent("third.test/app", {"DOCKER_CONFIG": str(tmp_path)}) is None


async def test_credential_helpers_are_asked_for_the_registry(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"credHelpers": {"registry.test": "test"}, "auths": {"registry.test": {"auth": "x"}}}))
    says = (
        'read server; echo "{\\"ServerURL\\": \\"$server\\", \\"Username\\": \\"me\\", \\"Secret\\": \\"$1 $server\\"}"'
    )
    base = {"REGISTRY_AUTH_FILE": str(config)}
    async with helper(tmp_path, says) as environ:
        sent_ = await auth_sent("registry.test/app", base | environ)
        assert base64.b64decode(sent_["auths"]["registry.test"]["auth"]) == b"me:get registry.test"
        config.write_text(json.dumps({"credsStore": "test"}))
        sent_ = await auth_sent("registry.test/app", base | environ)
        assert base64.b64decode(sent_["auths"]["registry.test"]["auth"]) == b"me:get registry.test"
    token = 'echo "{\\"Username\\": \\"<token>\\", \\"Secret\\": \\"t\\"}"'
    async with helper(tmp_path, token) as environ:
        assert await auth_sent("registry.test/app", base | environ) == {
            "auths": {"registry.test": {"identitytoken": "t"}}
        }
    async with helper(tmp_path, "echo credentials not found in native keychain; exit 1") as environ:
        assert await auth_sent("registry.test/app", base | environ) is None


@pytest.mark.parametrize(
    ("config", "script", "text"),
    [
        ('{"credsStore": "test"}', "echo locked; exit 1", "docker-credential-test failed with 1: locked"),
        ('{"credsStore": "test"}', "echo nonsense", "printed something else than credentials"),
        ('{"credsStore": "none"}', "", "docker-credential-none is not installed"),
        ('{"credsStore": "../evil"}', "", "is no name of a credential helper"),
        ('{"auths": "SECRET"}', "", "is no auth file"),
    ],
)
async def test_credentials_that_can_not_be_read_are_an_error_without_secrets(
    tmp_path: Path, config: str, script: str, text: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    async with helper(tmp_path, script) as environ, serving() as server:
        environ |= {"REGISTRY_AUTH_FILE": str(tmp_path / "config.json")}
        done = await volar(server, "images", "pull", "registry.test/app", environ=environ)
    assert done.code == 1
    assert text in done.err
    assert "SECRET" not in done.err
    assert not server.requests


async def test_an_auth_file_that_the_user_names_has_to_exist(tmp_path: Path) -> None:
    async with serving() as server:
        named = await volar(server, "images", "pull", "--authfile", str(tmp_path / "none"), "registry.test/app")
        environ = {"REGISTRY_AUTH_FILE": str(tmp_path / "none")}
        by_environment = await volar(server, "images", "pull", "registry.test/app", environ=environ)
    assert (named.code, by_environment.code) == (2, 2)
    assert not server.requests
