"""Measures answers: requests a second against an empty route, and `/healthz` during a flood by a guest."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from statistics import median
from urllib.parse import urlsplit

import httpx
import trio

from tests.system.kit import Daemon

from ._boot import BOOT_S, WANTED
from ._figure import Figure, Pairs, percentile
from ._http import LoadError, connect, get_once, latencies_s, requests_per_s, unverified
from ._world import current_image, listening, scratch, volantd

TARGET = 0.7
TLS_TARGET = 0.6
KEY_TARGET = 0.95
KEYS = 10_000
CONNECTIONS = 8
ROUNDS = 15
ROUND_S = 0.7
PROBES = 300
PROBE_INTERVAL_S = 0.02
_FLOOD_S = 5.0
"""A flood goes on for so long before the measurement: two thousand clients are no sooner there."""
_PRINT = ["sh", "-c", "for n in $(seq 200000); do echo $n says this again and again and again; done >/dev/console"]

_VM = f"/api/v1/vms/{WANTED.name}"


async def get_vm() -> list[Figure]:
    """`GET /api/v1/vms/{name}` in requests a second: against an empty Quart-Trio route on the same server, and over TLS
    against the same without."""
    current_image()
    against, tls = Pairs(), Pairs()
    with (
        volantd() as daemon,
        volantd("--tls-self-signed") as secured,
        listening("tests.bench._empty_route") as empty,
    ):
        for each in (daemon, secured):
            async with httpx.AsyncClient(base_url=each.base_url, verify=unverified(), timeout=BOOT_S) as http:
                # The VM has booted; no guest runs during the measurement.
                await create(http)
                (await http.post(f"{_VM}/stop?grace=1s&wait=stopped", timeout=BOOT_S)).raise_for_status()

        async def load(base_url: str, path: str, seconds: float) -> float:
            return await trio.to_thread.run_sync(
                lambda: requests_per_s(base_url, path, connections=CONNECTIONS, seconds=seconds)
            )

        for base_url, path in ((daemon.base_url, _VM), (secured.base_url, _VM), (empty, "/")):
            await load(base_url, path, 0.5)
        for number in range(ROUNDS):
            if number % 2:
                against.ours.append(await load(daemon.base_url, _VM, ROUND_S))
            against.bare.append(await load(empty, "/", ROUND_S))
            if not number % 2:
                against.ours.append(await load(daemon.base_url, _VM, ROUND_S))
            tls.add(await load(secured.base_url, _VM, ROUND_S), against.ours[-1])
    return [
        Figure(
            "get_vm", against.value, "requests/s", against.ratio,
            f"an empty Quart-Trio route's {against.other:.0f} on the same server, {CONNECTIONS} connections",
            at_least=TARGET,
        ),
        Figure(
            "get_vm_tls", tls.value, "requests/s", tls.ratio, f"the {tls.other:.0f} without TLS", at_least=TLS_TARGET
        ),
    ]  # fmt: skip


async def get_vm_key() -> list[Figure]:
    """The same with a named key that is one of ten thousand, against a daemon without keys."""
    current_image()
    pairs = Pairs()
    with volantd() as plain, volantd("--key-requests-per-s", "0") as keyed:
        for each in (plain, keyed):
            async with each.http() as http:
                await create(http)
                (await http.post(f"{_VM}/stop?grace=1s&wait=stopped", timeout=BOOT_S)).raise_for_status()
        key = await _made_keys(keyed)

        async def load(daemon: Daemon, key: str | None, seconds: float = ROUND_S) -> float:
            return await trio.to_thread.run_sync(
                lambda: requests_per_s(daemon.base_url, _VM, connections=CONNECTIONS, seconds=seconds, key=key)
            )

        await load(plain, None, 0.5)
        await load(keyed, key, 0.5)
        for _ in range(ROUNDS):
            pairs.add(await load(keyed, key), await load(plain, None))
    return [
        Figure(
            "get_vm_key", pairs.value, "requests/s", pairs.ratio, f"the {pairs.other:.0f} without a key",
            at_least=KEY_TARGET,
        )
    ]  # fmt: skip


async def _made_keys(daemon: Daemon) -> str:
    """Makes all keys; returns one of an operator."""
    limit = trio.CapacityLimiter(16)
    async with daemon.http() as http:
        made = await http.post("/api/v1/keys", json={"name": "ops", "role": "admin"})
        headers = {"X-Volant-API-Key": made.raise_for_status().json()["key"]}

        async def make(number: int) -> str:
            async with limit:
                body = {"name": f"ci-{number}", "role": "operator"}
                made = await http.post("/api/v1/keys", json=body, headers=headers, timeout=BOOT_S)
                return str(made.raise_for_status().json()["key"])

        async with trio.open_nursery() as nursery:
            for number in range(2, KEYS):
                nursery.start_soon(make, number)
        return await make(1)


async def healthz() -> list[Figure]:
    """The 99th percentile of `/healthz`, quiet and while an exec streams as fast as the guest can write."""
    async with beside_a_vm() as (daemon, quiet):
        with _exec_stream(daemon) as stream:
            busy = await probe(daemon)
            rate = stream.rate_mb_s()
    return [
        Figure(
            "healthz_p99", 1000 * percentile(busy, 99), "ms", percentile(busy, 99) / percentile(quiet, 99),
            f"the {1000 * percentile(quiet, 99):.3g} ms beside a silent guest; median {1000 * median(busy):.2g} ms",
        ),
        Figure("exec_stream", rate, "MB/s", to="of the answer's body, while /healthz was asked"),
    ]  # fmt: skip


async def healthz_floods() -> list[Figure]:
    """The 99th percentile of `/healthz`, quiet and during each flood of hostile clients."""
    async with beside_a_vm() as (daemon, quiet):
        async with daemon.http() as http:
            printed = await http.post(f"{_VM}/agent/v1/exec", json={"command": _PRINT}, timeout=BOOT_S)
            printed.raise_for_status()
        figures = [await _flooded(daemon, kind, quiet) for kind in ("heads", "searches")]
    with scratch() as directory:
        key = directory / "key"
        key.write_text("a-key-of-the-bench")
        key.chmod(0o600)
        with volantd("--api-key-file", str(key)) as daemon:
            return [*figures, await _flooded(daemon, "refused", await _settled(daemon))]


async def healthz_handshakes() -> list[Figure]:
    """The 99th percentile of `/healthz` over TLS, quiet and during a flood of handshakes."""
    with volantd("--tls-self-signed") as daemon:
        return [await _flooded(daemon, "handshakes", await _settled(daemon))]


async def _flooded(daemon: Daemon, kind: str, quiet: list[float]) -> Figure:
    with listening("tests.bench._hostile_clients", kind, daemon.base_url):
        await trio.sleep(_FLOOD_S)
        busy = await probe(daemon)
    return Figure(
        f"healthz_p99_{kind}", 1000 * percentile(busy, 99), "ms", percentile(busy, 99) / percentile(quiet, 99),
        f"the {1000 * percentile(quiet, 99):.3g} ms without; median {1000 * median(busy):.2g} ms", within=100,
    )  # fmt: skip


async def _settled(daemon: Daemon) -> list[float]:
    """Returns what `probe` returns of a daemon that has just started."""
    with trio.fail_after(BOOT_S):
        while await trio.to_thread.run_sync(get_once, daemon.base_url, "/healthz") != 200:  # noqa: ASYNC110
            await trio.sleep(PROBE_INTERVAL_S)
    await probe(daemon)
    return await probe(daemon)


@asynccontextmanager
async def beside_a_vm() -> AsyncIterator[tuple[Daemon, list[float]]]:
    """Gives a daemon with a silent VM, and what `probe` returns of it."""
    current_image()
    with volantd() as daemon:
        async with daemon.http() as http:
            await create(http)
            yield daemon, await probe(daemon)
            (await http.delete(_VM, timeout=90)).raise_for_status()


async def create(http: httpx.AsyncClient) -> None:
    """Starts the VM."""
    body = {"name": WANTED.name, "cpu_cores": WANTED.cpu_cores, "memory_mb": WANTED.memory_mb}
    made = await http.post(f"/api/v1/vms?wait=running&timeout={BOOT_S:.0f}s", json=body, timeout=2 * BOOT_S)
    if made.headers.get("volant-wait") != "met":
        raise RuntimeError(f"the VM did not boot: {made.text}")


async def probe(daemon: Daemon) -> list[float]:
    """Returns the seconds of each of several hundred requests for `/healthz`."""
    return await trio.to_thread.run_sync(
        lambda: latencies_s(daemon.base_url, "/healthz", count=PROBES, interval_s=PROBE_INTERVAL_S)
    )


class _Stream:
    """Reads an answer in a thread, and drops it."""

    def __init__(self) -> None:
        self.count = 0
        self.began = time.perf_counter()
        self.failure = ""

    def rate_mb_s(self) -> float:
        """Returns the MB/s so far. :raises LoadError: if the answer ended"""
        if self.failure or not self.count:
            raise LoadError(f"the exec stream broke off: {self.failure or 'nothing came'}")
        return self.count / (time.perf_counter() - self.began) / 1e6


@contextmanager
def _exec_stream(daemon: Daemon) -> Iterator[_Stream]:
    """Runs `cat /dev/zero` in the guest, and reads its output as fast as possible."""
    body = json.dumps({"command": ["cat", "/dev/zero"]}).encode()
    head = (
        f"POST {_VM}/agent/v1/exec HTTP/1.1\r\nHost: {urlsplit(daemon.base_url).netloc}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    stream = _Stream()
    over = threading.Event()
    sock = connect(daemon.base_url)

    def read() -> None:
        buffer = bytearray(1024 * 1024)
        try:
            while size := sock.recv_into(buffer):
                if not stream.count and not buffer.startswith(b"HTTP/1.1 200 "):
                    stream.failure = repr(bytes(buffer[:200]))
                    return
                stream.count += size
        except OSError as error:
            stream.failure = str(error)
            return
        if not over.is_set():
            stream.failure = "the daemon ended it"

    reader = threading.Thread(target=read, daemon=True)
    try:
        sock.sendall(head.encode() + body)
        reader.start()
        yield stream
    finally:
        over.set()
        sock.shutdown(2)
        sock.close()
        reader.join(10)
