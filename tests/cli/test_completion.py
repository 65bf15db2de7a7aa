"""A shell completes commands, options and the names that the daemon has; without a daemon it does so in silence."""

from __future__ import annotations

import shutil

import pytest

from tests.cli.kit import volar
from tests.client.kit import answer, serving, vm

PLUGIN = {
    "name": "browser", "version": "1", "description": "", "runtime": "browser", "enabled": True, "builtin": False,
    "created_at": None, "labels": {},
}  # fmt: skip

MANIFEST = {"name": "browser", "actions": {name: {"path": f"/{name}"} for name in ("go", "save", "shot")}}


def completing(*words: str) -> dict[str, str]:
    """As click's script for bash asks."""
    return {
        "_VOLAR_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(("volar", *words)),
        "COMP_CWORD": str(len(words)),
    }


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_there_is_a_script_for_each_shell(shell: str) -> None:
    if shell == "bash" and shutil.which("bash") is None:
        pytest.skip("click asks bash for its version, and there is none")
    done = await volar(None, "completion", shell)
    assert done.code == 0
    assert f"_VOLAR_COMPLETE={shell}_complete".encode() in done.out


async def test_names_come_from_the_daemon() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer([vm(), vm(name="dinner"), vm(name="other")])
        server.routes["GET /api/v1/plugins"] = answer([PLUGIN])
        vms = await volar(server, environ=completing("vms", "console", "d"))
        options = await volar(server, environ=completing("vms", "create", "x", "--plugin", "b"))
        server.routes["GET /api/v1/vms/demo"] = answer(vm(plugin="browser"))
        server.routes["GET /api/v1/plugins/browser/manifest"] = answer(MANIFEST)
        actions = await volar(server, environ=completing("call", "demo", "s"))
        paths = await volar(server, environ=completing("vms", "cp", "d"))
        commands = await volar(server, environ=completing("vms", "forw"))
    assert vms.out.decode().split() == ["plain,demo", "plain,dinner"]
    assert options.out.decode().split() == ["plain,browser"]
    assert actions.out.decode().split() == ["plain,save", "plain,shot"]
    assert paths.out.decode().split() == ["file,d", "plain,demo:", "plain,dinner:"]
    assert commands.out.decode().split() == ["plain,forward"]


async def test_without_a_daemon_completion_is_silent() -> None:
    done = await volar(None, environ={"VOLANT_API_BASE": "http://127.0.0.1:1", **completing("vms", "get", "d")})
    assert (done.out.strip(), done.err) == (b"", "")
