"""Named keys of a daemon that is killed: what was answered counts, and TCP stays closed."""

from __future__ import annotations

from collections.abc import Callable

import httpx

from tests.system.kit import Daemon

ROUNDS = 5


def close(daemon: Daemon) -> str:
    """Makes the first key; the fixture stops the daemon with it."""
    with httpx.Client(base_url=daemon.base_url, timeout=30, trust_env=False) as client:
        made = client.post("/api/v1/keys", json={"name": "ops", "role": "admin"}).raise_for_status()
    key = str(made.json()["key"])
    daemon.key = key
    return key


def status(daemon: Daemon, key: str | None) -> int:
    headers = {} if key is None else {"X-Volant-API-Key": key}
    with httpx.Client(base_url=daemon.base_url, headers=headers, timeout=30, trust_env=False) as client:
        return client.get("/api/v1/vms").status_code


def test_keys_that_were_answered_survive_a_kill_and_deleted_ones_stay_deleted(
    make_daemon: Callable[..., Daemon],
) -> None:
    daemon = make_daemon(ephemeral=False)
    ops = close(daemon)
    daemon.kill()
    daemon.start()
    assert (status(daemon, None), status(daemon, ops)) == (401, 200)
    headers = {"X-Volant-API-Key": ops}
    gone: list[str] = []
    for number in range(ROUNDS):
        with httpx.Client(base_url=daemon.base_url, headers=headers, timeout=30, trust_env=False) as client:
            body = {"name": f"ci-{number}", "role": "viewer"}
            key = client.post("/api/v1/keys", json=body).raise_for_status().json()["key"]
            new = client.post(f"/api/v1/keys/ci-{number}/rotate").raise_for_status().json()["key"]
            if number % 2:
                client.delete(f"/api/v1/keys/ci-{number}").raise_for_status()
        # The very next thing after the answer.
        daemon.kill()
        daemon.start()
        gone.append(key)
        if number % 2:
            gone.append(new)
        else:
            assert status(daemon, new) == 200
        assert [status(daemon, each) for each in gone] == [401] * len(gone)
    assert (status(daemon, None), status(daemon, ops)) == (401, 200)


def test_a_daemon_with_named_keys_may_listen_on_other_addresses(make_daemon: Callable[..., Daemon]) -> None:
    daemon = make_daemon(ephemeral=False)
    close(daemon)
    assert daemon.stop() == 0
    daemon.command = [*daemon.command, "--listen", "0.0.0.0:0"]
    daemon.start()
    daemon.base_url = daemon.base_url.replace("0.0.0.0", "127.0.0.1")
    assert status(daemon, None) == 401
