"""`volar mcp` prints what each client of the protocol reads, with the URL of the daemon and without any key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .kit import Done, volar

KEY = "k3y-0123456789abcdef"
URL = "http://127.0.0.1:7777/api/v1/mcp"
CLIENTS = ["claude-code", "claude-desktop", "cursor", "vscode", "generic"]


def servers(done: Done) -> dict[str, Any]:
    """By client, what it is told of the daemon."""
    assert done.code == 0, done.err
    configurations: dict[str, Any] = json.loads(done.out)
    assert list(configurations) == sorted(CLIENTS)
    return {
        name: configuration["servers" if name == "vscode" else "mcpServers"]["volant"]
        for name, configuration in configurations.items()
    }


async def test_each_client_gets_the_url() -> None:
    for name, server in servers(await volar(None, "--json", "mcp")).items():
        assert URL in (server["args"] if name == "claude-desktop" else [server["url"]])
        assert "API" not in json.dumps(server)


@pytest.mark.parametrize("how", ["environment", "file", "flag"])
async def test_with_a_key_the_configuration_refers_to_it_and_never_contains_it(tmp_path: Path, how: str) -> None:
    (tmp_path / "key").write_text(KEY)
    words = {"environment": [], "file": ["--api-key-file", str(tmp_path / "key")], "flag": ["--key"]}[how]
    done = await volar(None, "--json", "mcp", *words, environ={"VOLANT_API_KEY": KEY} if how == "environment" else {})
    assert KEY not in done.out.decode() + done.err
    for server in servers(done).values():
        assert "X-Volant-API-Key" in json.dumps(server)


async def test_one_client_gets_json_that_can_be_redirected() -> None:
    done = await volar(None, "mcp", "--client", "cursor", "--no-key", environ={"VOLANT_API_KEY": KEY})
    assert json.loads(done.out) == {"mcpServers": {"volant": {"url": URL}}}
    assert "~/.cursor/mcp.json" in done.err


async def test_all_clients_are_shown_with_their_files() -> None:
    done = await volar(None, "--api", "https://volant.example/behind", "mcp")
    assert done.code == 0
    assert done.out.decode().count('"https://volant.example:443/behind/api/v1/mcp"') == len(CLIENTS)
    for client in CLIENTS:
        assert f"--client {client}" in done.out.decode()


async def test_an_address_that_no_client_can_use_is_wrong_usage() -> None:
    for address in ("unix:/run/volant/api.sock", "ftp://x"):
        assert (await volar(None, "--api", address, "mcp")).code == 2


async def test_plain_http_to_another_host_is_allowed_explicitly() -> None:
    far = await volar(None, "--api", "http://192.0.2.1:7777", "mcp", "--client", "claude-desktop")
    assert "--allow-http" in far.out.decode()
    near = await volar(None, "mcp", "--client", "claude-desktop")
    assert "--allow-http" not in near.out.decode()
