"""What the hosts of a fleet share: a change is drafted, and taken once they have agreed on it."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import trio
import trio.testing

from actors import Request
from tests.journal.kit import Bench, running
from volant.journal import (
    SHARED,
    AddKey,
    AddNetwork,
    AddProject,
    BadRow,
    Changes,
    Draft,
    DuplicateRequest,
    IdempotencyKey,
    NetworkCreated,
    NoteKeyUses,
    RemoveKey,
    RemoveNetwork,
    RemoveProject,
    SetQuota,
    TakeDefinitions,
    definitions_of,
    encode_definition,
    read_definition,
    uses_of,
)
from volant.model import (
    DEFAULT_PROJECT,
    CreateApiKey,
    CreateNetwork,
    CreateProject,
    Key,
    KeyUse,
    Problem,
    Quota,
    Role,
)

DIGEST = "ab" * 32


def add_key(name: str, digest: str = DIGEST, role: Role = Role.ADMIN) -> AddKey:
    project = None if role is Role.ADMIN else DEFAULT_PROJECT
    return AddKey(CreateApiKey(name=name, role=role, project=project), digest, digest[:32], "test", False)


def travelled(changes: Changes) -> Changes:
    """As another host reads them."""
    return {
        place: None if each is None else read_definition(place, encode_definition(each))
        for place, each in changes.items()
    }


async def draft(bench: Bench, change: Request[Any]) -> Changes:
    changes: Changes = (await bench.ask(Draft(change))).changes
    return changes


async def test_a_draft_changes_nothing_and_hosts_that_take_it_are_equal(path: Path, tmp_path: Path) -> None:
    other_path = tmp_path / "other.db"
    async with running(path) as one, running(other_path) as other:
        for change in (
            AddProject(CreateProject(name="team")),
            SetQuota("team", Quota(vms=3)),
            AddNetwork(CreateNetwork(name="net"), "team"),
            add_key("root"),
            add_key("ci", "cd" * 32),
            RemoveKey("ci", False),
            RemoveNetwork(Key("team", "net")),
            SetQuota(DEFAULT_PROJECT, Quota(vms=9)),
        ):
            before = definitions_of(one.store)
            drafted = await one.ask(Draft(change))
            assert definitions_of(one.store) == before
            assert drafted.changes
            assert await one.ask(TakeDefinitions(drafted.changes, change, drafted.reply)) == drafted.reply
            await other.ask(TakeDefinitions(travelled(drafted.changes)))
            assert definitions_of(one.store) == definitions_of(other.store) != before
        assert one.store.keys.required
        assert other.store.keys.required
        # It is durable.
        kept = definitions_of(one.store)
    async with running(path) as again:
        assert definitions_of(again.store) == kept


async def test_a_draft_is_refused_as_the_change_would_be(path: Path) -> None:
    async with running(path) as bench:
        for change, status in (
            (AddProject(CreateProject(name="Not a name")), 400),
            (RemoveProject("nothing"), 404),
            (RemoveProject(DEFAULT_PROJECT), 409),
            (add_key("ci", role=Role.VIEWER), 409),
        ):
            with pytest.raises(Problem) as refused:
                await bench.ask(Draft(change))
            assert refused.value.status == status
        # A refusal is no crash.
        assert await draft(bench, add_key("root"))


async def test_what_is_taken_is_not_decided_again_and_stores_the_response_of_its_change(path: Path) -> None:
    key = IdempotencyKey(b"scope", b"request", DEFAULT_PROJECT)
    change = AddNetwork(CreateNetwork(name="net"), DEFAULT_PROJECT, key)
    async with running(path) as bench:
        drafted = await bench.ask(Draft(change))
        # The mirror of the fleet may be faster than the one that made the change.
        await bench.ask(TakeDefinitions(drafted.changes))
        assert await bench.ask(TakeDefinitions(drafted.changes, change, drafted.reply)) == drafted.reply
        with pytest.raises(DuplicateRequest) as duplicate:
            await bench.ask(Draft(change))
        assert isinstance(duplicate.value.result, NetworkCreated)
        assert duplicate.value.result.network.name == "net"
        removed = await draft(bench, RemoveNetwork(Key(DEFAULT_PROJECT, "net")))
        await bench.ask(TakeDefinitions(removed))
        await bench.ask(TakeDefinitions(removed))
        assert not bench.store.projection.networks


async def test_a_host_keeps_its_own_uses_of_keys_and_hears_that_tcp_is_closed(path: Path) -> None:
    async with running(path) as bench:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bench.store.keys.changed)
            await trio.testing.wait_all_tasks_blocked()
            await bench.ask(TakeDefinitions({"keys-required": read_definition("keys-required", b"{}")}))
        assert bench.store.keys.required
        changes = await draft(bench, add_key("root"))
        await bench.ask(TakeDefinitions(changes))
        use = KeyUse(datetime.now(UTC), "192.0.2.1")
        await bench.ask(NoteKeyUses({DIGEST: use}))
        [(place, own)] = [each for each in definitions_of(bench.store).items() if each[0].startswith("key/")]
        assert b"192.0.2.1" not in encode_definition(own)
        await bench.ask(TakeDefinitions(travelled(changes)))
        found = bench.store.keys.find(DIGEST)
        assert found is not None
        assert found.used == use
        await bench.ask(TakeDefinitions({place: None}))
        assert bench.store.keys.find(DIGEST) is None


async def test_a_definition_that_no_host_has_written_is_refused(path: Path) -> None:
    async with running(path) as bench:
        [(place, network)] = (await draft(bench, AddNetwork(CreateNetwork(name="net"), "default"))).items()
        assert network is not None
        good = encode_definition(network)
        assert read_definition(place, good) == network
        for bad_place, bad in (
            (place, b"{"),
            (place, good.replace(b'"net"', b'"../x"')),
            ("network/default/other", good),
            ("network/../net", good),
            ("volume/default/net", good),
            ("nothing", b"{}"),
            ("key/00", good),
        ):
            with pytest.raises(BadRow):
                read_definition(bad_place, bad)


async def test_what_something_needs_is_in_use(path: Path) -> None:
    async with running(path) as bench:
        await bench.create("web")
        assert uses_of(bench.store.projection) == {"plugin/default/base", "project/default/default"}


def test_all_changes_of_definitions_are_known() -> None:
    """A new kind of change that is forgotten in `SHARED` would be made on one host alone."""
    from volant.journal._changes import DECISIONS

    kinds = {"Plugin", "Network", "Project", "Secret", "ApiKey"}
    returning = {
        message
        for message, decision in DECISIONS.items()
        if getattr(get_type_hints(decision).get("return"), "__name__", "") in kinds
    }
    assert returning <= SHARED
    assert {message for message in DECISIONS if message.__name__.startswith("Remove")} - SHARED == {
        message for message in DECISIONS if message.__name__ == "RemoveSnapshot"
    }
