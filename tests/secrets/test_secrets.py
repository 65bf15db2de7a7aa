"""Secrets at rest: encrypted, bound to their row, and of no use without their key, which harms nothing else."""

# ruff: noqa: ASYNC240 - small files of the test's own

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
import trio

from tests.journal.kit import Bench, running
from volant.journal import AddProject, DatabaseRefused
from volant.model import DEFAULT_PROJECT, CreateProject, Key, Problem, SecretRef, SetSecret
from volant.secrets import KeyFile, SecretFailed, Secrets

VALUE = b"correct horse battery staple"
TOKEN = Key(DEFAULT_PROJECT, "token")
OTHER = Key(DEFAULT_PROJECT, "other")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state" / "volant.db"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    return tmp_path / "state-keys" / "secrets.key"


@asynccontextmanager
async def keeping(path: Path, key_file: Path) -> AsyncIterator[tuple[Secrets, Bench]]:
    async with running(path) as bench:
        if not bench.store.projection.project("web"):
            await bench.ask(AddProject(CreateProject(name="web")))
        host = bench.store.host
        yield Secrets(host, bench.store, bench.journal, KeyFile(host, key_file)), bench


def text(value: bytes = VALUE) -> SetSecret:
    return SetSecret(value=value.decode())


async def test_a_value_is_kept_encrypted_and_its_versions_count(path: Path, key_file: Path) -> None:
    async with keeping(path, key_file) as (secrets, _):
        first = await secrets.set(TOKEN, text(b"first"))
        again = await secrets.set(TOKEN, text())
        assert (first.version, again.version, again.readable) == (1, 2, True)
        assert again.created_at == first.created_at < again.updated_at
        await secrets.set(Key("web", "token"), text(b"of another project"))
        assert await secrets.value(TOKEN) == VALUE
    for file in path.parent.iterdir():
        assert VALUE not in file.read_bytes(), file
    async with keeping(path, key_file) as (secrets, _):
        assert await secrets.value(TOKEN) == VALUE
        assert [view.name for view in await secrets.views(DEFAULT_PROJECT)] == ["token"]
        assert [view.project for view in await secrets.views(None)] == ["default", "web"]
        await secrets.delete(TOKEN)
        with pytest.raises(Problem, match="no secret named 'token'"):
            await secrets.value(TOKEN)


async def test_no_two_values_are_encrypted_alike(path: Path, key_file: Path) -> None:
    async with keeping(path, key_file) as (secrets, bench):
        for name in (TOKEN, OTHER):
            await secrets.set(name, text())
        sealed = [secret.sealed for secret in bench.store.projection.secrets.values()]
        assert sealed[0][:12] != sealed[1][:12]
        assert sealed[0][12:] != sealed[1][12:]


async def test_the_key_is_a_file_of_the_daemons_own_beside_its_state(path: Path, key_file: Path) -> None:
    async with keeping(path, key_file) as (secrets, _):
        assert not key_file.exists()
        await secrets.set(TOKEN, text())
        assert (key_file.stat().st_mode & 0o777, key_file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        assert len(bytes.fromhex(key_file.read_text())) == 32


async def test_secrets_that_are_first_set_at_once_have_one_key(path: Path, key_file: Path) -> None:
    async with keeping(path, key_file) as (secrets, _):
        async with trio.open_nursery() as nursery:
            for number in range(8):
                nursery.start_soon(secrets.set, Key(DEFAULT_PROJECT, f"s{number}"), text())
                nursery.start_soon(secrets.set, TOKEN, text())
        views = await secrets.views(None)
        assert all(view.readable for view in views)
        assert {view.name: view.version for view in views}["token"] == 8


@pytest.mark.parametrize(
    ("lose", "why"),
    [
        (lambda file: file.unlink(), "there is no such file"),
        (lambda file: file.write_text("0" * 64 + "\n"), "does not have"),
        (lambda file: file.write_text("not a key\n"), "64 hexadecimal digits"),
        (lambda file: file.write_text(""), "64 hexadecimal digits"),
        (lambda file: file.chmod(0o644), "chmod 600"),
    ],
)
async def test_a_lost_or_wrong_key_says_what_to_do_and_harms_nothing_else(
    path: Path, key_file: Path, lose: Callable[[Path], None], why: str
) -> None:
    async with keeping(path, key_file) as (secrets, bench):
        await secrets.set(TOKEN, text())
        await bench.create("plain")
        row = await bench.create("user", env={"T": SecretRef("token")})
    kept = key_file.read_bytes()
    lose(key_file)
    async with keeping(path, key_file) as (secrets, bench):
        with pytest.raises(SecretFailed) as failed:
            await secrets.values_for(row)
        assert failed.value.code == "secret_unreadable"
        assert why in str(failed.value)
        assert str(key_file) in str(failed.value)
        view = await secrets.view(TOKEN)
        assert (view.readable, view.used_by) == (False, ("user",))
        await bench.create("another")
        # With the key back, without a restart.
        key_file.write_bytes(kept)
        key_file.chmod(0o600)
        assert (await secrets.values_for(row)).env == {"T": VALUE}


async def test_a_lost_key_is_not_replaced_unnoticed(path: Path, key_file: Path) -> None:
    async with keeping(path, key_file) as (secrets, _):
        await secrets.set(TOKEN, text())
        key_file.unlink()
        with pytest.raises(Problem) as refused:
            await secrets.set(OTHER, text())
        assert (refused.value.status, refused.value.code) == (503, "secrets-key-unusable")
        assert "openssl rand -hex 32" in (refused.value.hint or "")
        assert not key_file.exists()
        with pytest.raises(Problem) as refused:
            await secrets.reencrypt()
        assert (refused.value.status, refused.value.code) == (503, "secrets-key-unusable")
        # What the hint says helps.
        key_file.write_text("ab" * 32 + "\n")
        key_file.chmod(0o600)
        assert (await secrets.set(TOKEN, text())).readable
        assert await secrets.value(TOKEN) == VALUE


async def test_a_key_is_replaced_and_the_old_one_then_of_no_use(path: Path, key_file: Path) -> None:
    async with keeping(path, key_file) as (secrets, _):
        await secrets.set(TOKEN, text())
        await secrets.set(Key("web", "token"), text())
        old = key_file.read_text()
        key_file.write_text("cd" * 32 + "\n# before:\n" + old)
        await secrets.set(OTHER, text())
        before = await secrets.view(TOKEN)
        done = await secrets.reencrypt()
        assert (done.reencrypted, done.unreadable) == (2, ())
        assert (await secrets.reencrypt()).reencrypted == 0
        assert await secrets.view(TOKEN) == before, "neither version nor time change"
        key_file.write_text("cd" * 32 + "\n")
        assert await secrets.value(TOKEN) == await secrets.value(Key("web", "token")) == VALUE
        key_file.write_text("ef" * 32 + "\n")
        assert (await secrets.reencrypt()).unreadable == ("default/other", "default/token", "web/token")


def row_of(path: Path, name: str) -> dict[str, Any]:
    """Returns the stored row of a secret."""
    connection = apsw.Connection(str(path))
    data = connection.execute("SELECT value FROM named WHERE kind = 'secret' AND name = ?", (name,)).get
    connection.close()
    assert isinstance(data, bytes)
    return dict(msgspec.json.decode(data))


def change(path: Path, name: str, /, **members: Any) -> None:
    """Changes members of the row of a secret, as somebody with the database can."""
    row = msgspec.json.encode(row_of(path, name) | members)
    connection = apsw.Connection(str(path))
    connection.execute("UPDATE named SET value = ? WHERE kind = 'secret' AND name = ?", (row, name))
    connection.close()


async def test_a_value_that_is_moved_to_another_row_does_not_decrypt(path: Path, key_file: Path) -> None:
    async with keeping(path, key_file) as (secrets, _):
        await secrets.set(TOKEN, text(b"of an administrator"))
        await secrets.set(OTHER, text(b"of a user"))
    change(path, "other", sealed=row_of(path, "token")["sealed"])
    async with keeping(path, key_file) as (secrets, _):
        with pytest.raises(Problem, match="changed, or moved from another secret"):
            await secrets.value(OTHER)
        assert await secrets.value(TOKEN) == b"of an administrator"


async def test_an_older_value_in_a_newer_row_and_a_changed_byte_do_not_decrypt(path: Path, key_file: Path) -> None:
    async with keeping(path, key_file) as (secrets, _):
        await secrets.set(TOKEN, text(b"old"))
    old = row_of(path, "token")["sealed"]
    async with keeping(path, key_file) as (secrets, _):
        await secrets.set(TOKEN, text(b"new"))
    new = row_of(path, "token")["sealed"]
    for sealed in (old, new[:-4] + ("AAA=" if new[-4:] != "AAA=" else "BBB="), "", "AAAA"):
        change(path, "token", sealed=sealed)
        async with keeping(path, key_file) as (secrets, _):
            with pytest.raises(Problem, match="is not what the daemon has written"):
                await secrets.value(TOKEN)
    change(path, "token", sealed=new)
    async with keeping(path, key_file) as (secrets, _):
        assert await secrets.value(TOKEN) == b"new"


@pytest.mark.parametrize(
    "members",
    [
        {"key_id": "../../etc"},
        {"version": 0},
        {"name": "Token"},
        {"project": "a/b"},
        {"sealed": "A" * 4 * 25000},
        {"updated_at": "2025-01-01T00:00:00"},
    ],
)
async def test_a_row_that_volantd_can_not_have_written_is_refused(
    path: Path, key_file: Path, members: dict[str, Any]
) -> None:
    async with keeping(path, key_file) as (secrets, _):
        await secrets.set(TOKEN, text())
    change(path, "token", **members)
    with pytest.RaisesGroup(DatabaseRefused, flatten_subgroups=True, allow_unwrapped=True):
        async with keeping(path, key_file):
            pass


async def test_a_vm_gets_its_values_by_variable_and_path(path: Path, key_file: Path) -> None:
    async with keeping(path, key_file) as (secrets, bench):
        await secrets.set(TOKEN, text())
        await secrets.set(OTHER, SetSecret(value="AP8=", encoding="base64"))
        row = await bench.create(
            "demo", env={"PLAIN": "x", "TOKEN": SecretRef("token")}, secrets=("token", "other:/run/app/key")
        )
        assert (row.env, row.secret_env) == ({"PLAIN": "x"}, {"TOKEN": "token"})
        values = await secrets.values_for(row)
        assert values.env == {"TOKEN": VALUE}
        assert values.files == {"/run/secrets/token": VALUE, "/run/app/key": b"\x00\xff"}
        assert "staple" not in repr(values)
        binary = await bench.create("binary", env={"KEY": SecretRef("other")})
        with pytest.raises(SecretFailed, match="not UTF-8 without NUL"):
            await secrets.values_for(binary)


async def test_all_values_of_a_vm_fit_into_one_request(path: Path, key_file: Path) -> None:
    async with keeping(path, key_file) as (secrets, bench):
        await secrets.set(TOKEN, text(b"x" * 65536))
        row = await bench.create("demo", secrets=[f"token:/run/{number}" for number in range(8)])
        assert len((await secrets.values_for(row)).files) == 8
        row = await bench.create("more", secrets=[f"token:/run/{number}" for number in range(9)])
        with pytest.raises(SecretFailed, match="more than 512 KiB"):
            await secrets.values_for(row)


async def test_a_secret_that_a_vm_refers_to_is_not_deleted(path: Path, key_file: Path) -> None:
    async with keeping(path, key_file) as (secrets, bench):
        await secrets.set(TOKEN, text())
        row = await bench.create("demo", secrets=["token"])
        with pytest.raises(Problem, match="in use by 1 VM: demo"):
            await secrets.delete(TOKEN)
        await bench.delete(row)
        await secrets.delete(TOKEN)
        for fields, field in (({"secrets": ["token"]}, "secrets"), ({"env": {"T": SecretRef("token")}}, "env.T")):
            with pytest.raises(Problem) as missing:
                await bench.create("demo", **fields)
            assert (missing.value.code, missing.value.field) == ("secret-not-found", field)


async def test_without_the_package_the_error_names_it_and_nothing_else_fails(
    path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.startswith("cryptography"):
            raise ImportError("No module named 'cryptography'")
        return real_import(name, *rest, **named)

    async with keeping(path, key_file) as (secrets, bench):
        with monkeypatch.context() as patched:
            patched.setattr(builtins, "__import__", without)
            with pytest.raises(Problem) as missing:
                await secrets.set(TOKEN, text())
            assert (missing.value.status, missing.value.code) == (503, "secrets-unavailable")
            assert "pip install" in (missing.value.hint or "")
            await bench.create("demo")
        await secrets.set(TOKEN, text())


async def test_there_is_a_limit(path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("volant.journal._definition_changes.MAX_SECRETS", 2)
    async with keeping(path, key_file) as (secrets, _):
        for name in ("a", "b"):
            await secrets.set(Key(DEFAULT_PROJECT, name), text())
        with pytest.raises(Problem, match="the limit"):
            await secrets.set(Key("web", "c"), text())
        await secrets.set(Key(DEFAULT_PROJECT, "a"), text())
