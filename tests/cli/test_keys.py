"""`volar` shows a key that it is given in a file or the environment, and never takes one as an argument."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.client.kit import answer, serving

from .kit import volar

KEY = "k3y-0123456789abcdef"
OTHER = "other-0123456789abcdef"


@pytest.mark.parametrize(
    ("words", "environ", "shown"),
    [
        ([], {}, None),
        ([], {"VOLANT_API_KEY": ""}, None),
        ([], {"VOLANT_API_KEY": KEY}, KEY),
        ([], {"VOLANT_API_KEY_FILE": "FILE"}, KEY),
        ([], {"VOLANT_API_KEY_FILE": "FILE", "VOLANT_API_KEY": OTHER}, OTHER),
        (["--api-key-file", "FILE"], {"VOLANT_API_KEY": OTHER}, KEY),
    ],
)
async def test_a_key_comes_from_the_environment_or_a_file(
    tmp_path: Path, words: list[str], environ: dict[str, str], shown: str | None
) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# the new one\n\n {KEY} \n{OTHER}\n")
    words = [word.replace("FILE", str(file)) for word in words]
    environ = {name: value.replace("FILE", str(file)) for name, value in environ.items()}
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer([])
        for line in ([*words, "vms", "list"], ["vms", "list", *words]):
            assert (await volar(server, *line, environ=environ)).code == 0
        assert [request.headers.get("x-volant-api-key") for request in server.requests] == [shown, shown]


async def test_a_key_can_not_be_an_argument() -> None:
    done = await volar(None, "--api-key", KEY, "vms", "list")
    assert done.code == 2


async def test_a_malformed_key_is_wrong_usage_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# none\n")
    for words, environ in (
        ([], {"VOLANT_API_KEY": "two words"}),
        (["--api-key-file", str(tmp_path / "keys")], {}),
        (["--api-key-file", str(tmp_path / "none")], {}),
    ):
        done = await volar(None, *words, "vms", "list", environ=environ)
        assert done.code == 2
        assert "two words" not in done.err
