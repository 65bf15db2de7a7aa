"""A snapshot goes from one host to another without a registry, by the same chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from actors import Request
from tests.api.kit import Api, Unanswered, until
from tests.chunks.test_chunks import Peer
from tests.transfer.kit import files_of, host, left_by_pulls, take
from volant.journal import AddSnapshot, FinishSnapshot
from volant.model import DEFAULT_PROJECT, Key, Problem, Snapshot
from volant.oci import digest_of
from volant.transfer import BaseFiles, Incoming, OwnSnapshots, Transfer, decode, encode

pytestmark = pytest.mark.programs


def own(running: Api) -> OwnSnapshots:
    deps = running.deps
    bases = BaseFiles(deps.vms.artifacts, deps.oci, deps.vms.settings)
    return OwnSnapshots(deps.host, deps.store, deps.vms.copies, bases)


async def admit(snapshot: Snapshot) -> None:
    await trio.lowlevel.checkpoint()


async def test_a_snapshot_goes_straight_to_another_host(tmp_path: Path) -> None:
    async with host(tmp_path / "here", "none") as here, host(tmp_path / "there", "none") as there:
        received: list[int] = []
        for name, letters in (("first", "abcdef"), ("second", "abcxef")):
            await take(here, name, letters)
            wire, sent, got = Peer(), *(Transfer("push", DEFAULT_PROJECT, name, "there") for _ in range(2))
            async with own(here).sending(own(here).find(Key(DEFAULT_PROJECT, name))) as outgoing:
                await outgoing.send(wire, sent)
            data = encode(outgoing.document)
            incoming = Incoming(decode(data, max_bytes=2**30), digest_of(data), "here", DEFAULT_PROJECT, None)
            kept = await own(there).receive(incoming, wire, admit, got)
            assert (kept.name, kept.source, kept.status) == (name, "here", "ready")
            assert files_of(there, name) == files_of(here, name)
            received.append(got.progress.moved_chunks)
        assert received == [7, 2]
        assert left_by_pulls(there) == []


@pytest.mark.parametrize("lost", [AddSnapshot, FinishSnapshot])
async def test_a_snapshot_that_the_journal_has_not_confirmed_is_whole_or_gone(
    tmp_path: Path, lost: type[Request[Any]]
) -> None:
    async with host(tmp_path / "here", "none") as here:
        copies, projection = here.deps.vms.copies, here.deps.store.projection
        unanswered: Any = Unanswered(copies.journal, lost)
        copies.journal = unanswered
        with pytest.raises(Problem) as failed:
            await take(here, "one", "abc")
        assert failed.value.code == "journal-down"
        await until(lambda: all(each.status == "ready" for each in projection.snapshots.values()))
        assert len(projection.snapshots) == (lost is FinishSnapshot)


async def test_the_name_of_a_snapshot_that_is_being_made_or_removed_is_not_taken_for_good(tmp_path: Path) -> None:
    """A request that is repeated after a kill finds what it has left itself: 409 would be stored for its key."""
    async with host(tmp_path / "here", "none") as here:
        snapshot = await take(here, "one", "abc")
        left = msgspec.structs.replace(snapshot, id="two-id", name="two", status="creating")
        await here.deps.journal.ask(AddSnapshot(left), timeout_s=10)
        for name, status in (("one", 409), ("two", 503)):
            with pytest.raises(Problem) as refused:
                own(here).check_free(Key(DEFAULT_PROJECT, name))
            assert refused.value.status == status
