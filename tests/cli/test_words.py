"""All groups use the same words, such as `list` and `delete`; other words find them, and mistyped ones suggest them."""

from __future__ import annotations

import click
import pytest

from tests.client.kit import answer, problem, serving, vm
from volant.cli._lazy_group import ALIASES, LazyGroup
from volant.cli._volar import volar as root

from .kit import volar


def groups() -> list[tuple[str, LazyGroup]]:
    """Returns all groups of commands, by name."""
    context = click.Context(root)
    found = [(name, root.get_command(context, name)) for name in root.list_commands(context)]
    return [(name, group) for name, group in found if isinstance(group, LazyGroup)]


@pytest.mark.parametrize(("name", "group"), groups(), ids=[name for name, _ in groups()])
def test_groups_use_the_same_words(name: str, group: LazyGroup) -> None:
    context = click.Context(group)
    listed = group.list_commands(context)
    assert not set(ALIASES) & set(listed), f"volar {name} has a command that is an alias elsewhere"
    for alias, word in ALIASES.items():
        assert group.get_command(context, alias) is (group.get_command(context, word) if word in listed else None)


@pytest.mark.parametrize(("name", "group"), groups(), ids=[name for name, _ in groups()])
def test_lists_have_the_options_of_lists(name: str, group: LazyGroup) -> None:
    listing = group.get_command(click.Context(group), "list")
    if listing is not None:
        options = {option for parameter in listing.params for option in parameter.opts}
        assert {"-q", "--quiet", "-o", "--output", "--json"} <= options, f"volar {name} list"


async def test_a_list_is_a_table_a_document_or_names() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer([vm(name="one"), vm(name="two")])
        table = await volar(server, "vms", "list", "-o", "table")
        document = [await volar(server, "vms", "list", *words) for words in (["--json"], ["-o", "json"])]
        names = [await volar(server, "vms", "list", *words) for words in (["-q"], ["-o", "name"])]
        wrong = await volar(server, "vms", "list", "-o", "xml")
    assert table.out.startswith(b"NAME ")
    assert document[0].out == document[1].out
    assert [done.out for done in names] == [b"one\ntwo\n"] * 2
    assert wrong.code == 2


async def test_old_and_short_words_find_the_command() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms"] = answer([vm()])
        server.routes["DELETE /api/v1/networks/blue"] = answer(None, 204)
        listed = await volar(server, "vms", "ls")
        gone = [await volar(server, "networks", word, "blue") for word in ("delete", "rm", "remove")]
    assert listed.out.decode().splitlines()[1].split()[0] == "demo"
    assert {done.out for done in gone} == {b"network blue is deleted\n"}


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["vmss", "list"], "'vms'"),
        (["vms", "lst"], "'list'"),
        (["snapshots", "delet", "x"], "'delete'"),
        (["vms", "list", "--lable", "a=b"], "'--label'"),
    ],
)
async def test_a_mistyped_word_is_wrong_usage_and_the_right_one_is_suggested(words: list[str], meant: str) -> None:
    done = await volar(None, *words)
    assert done.code == 2
    assert "Did you mean" in done.err
    assert meant in done.err


async def test_a_word_like_no_other_suggests_nothing() -> None:
    done = await volar(None, "zzzzzz")
    assert (done.code, "Did you mean" in done.err) == (2, False)


async def test_a_mistyped_vm_suggests_one_that_exists() -> None:
    async with serving() as server:
        server.routes["GET /api/v1/vms/wbe"] = problem(404, "vm-not-found", "no VM 'wbe'", hint="list them", vm="wbe")
        server.routes["GET /api/v1/vms"] = answer([vm(name="web"), vm(name="other")])
        similar = await volar(server, "vms", "get", "wbe")
        server.routes["GET /api/v1/vms"] = answer([vm(name="other")])
        different = await volar(server, "vms", "get", "wbe")
    assert (similar.code, similar.err) == (3, "volar: no VM 'wbe'\n  did you mean 'web'?\n")
    assert (different.code, different.err) == (3, "volar: no VM 'wbe'\n  list them\n")
