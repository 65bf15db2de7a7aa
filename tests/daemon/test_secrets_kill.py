"""Secrets of a daemon that is killed: what was answered counts, and no kill loses a value or the key."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import httpx
import trio

from tests.journal.kit import running
from tests.system.kit import Daemon
from volant.model import Key, Problem
from volant.secrets import KeyFile, Secrets

ROUNDS = 6
"""By hand, 40."""
TOKEN = Key("default", "token")
_SPREAD_S = 0.04
"""About as long as the daemon takes for some requests."""


async def test_a_secret_is_the_last_that_was_answered_or_the_one_that_was_sent(
    make_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    key_file = tmp_path / "keys" / "secrets.key"
    daemon = make_daemon(ephemeral=False, environ={"VOLANT_SECRETS_KEY_FILE": str(key_file)})
    draw = random.Random(1)
    sent = answered = kept = 0

    async def set_again_and_again(first_answer: trio.Event) -> None:
        nonlocal sent, answered
        while True:
            sent += 1
            try:
                await trio.to_thread.run_sync(put, daemon.base_url, f"value {sent}")
            except httpx.TransportError:
                # Whether it is done, nobody knows.
                return
            answered = sent
            first_answer.set()

    for number in range(ROUNDS):
        async with trio.open_nursery() as nursery:
            first_answer = trio.Event()
            nursery.start_soon(set_again_and_again, first_answer)
            # The first round kills it while it makes its key, some before they get an answer.
            if number % 3:
                await first_answer.wait()
            await trio.sleep(draw.random() * _SPREAD_S)
            daemon.kill()
        present = await value_of(daemon, key_file)
        if present is None:
            assert answered == 0
        else:
            # One without an answer may be there, from this round or the one before.
            number_of_value = int(present.removeprefix(b"value "))
            assert max(answered, kept) <= number_of_value <= sent
            kept = number_of_value
        daemon.start()
        async with daemon.client() as client:
            shown = await client.secrets.list()
        assert [each.readable for each in shown] == ([] if present is None else [True])
    assert answered > 0


def put(base_url: str, value: str) -> None:
    """Sets the secret, on a connection of its own. :raises httpx.TransportError: it broke."""
    with httpx.Client(base_url=base_url, timeout=30, trust_env=False) as client:
        client.put("/api/v1/secrets/token", json={"value": value}).raise_for_status()


async def value_of(daemon: Daemon, key_file: Path) -> bytes | None:
    """Returns the value in the database of a daemon that does not run, as no API gives it; None: there is none."""
    async with running(daemon.state_dir / "volant.db") as bench:
        host = bench.store.host
        try:
            return await Secrets(host, bench.store, bench.journal, KeyFile(host, key_file)).value(TOKEN)
        except Problem as problem:
            if problem.code != "secret-not-found":
                raise
            return None
