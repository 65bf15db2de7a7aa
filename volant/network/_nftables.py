"""Loads nftables rules with the program `nft`, which applies a text in one transaction, or names the wrong line.

Rejected: netlink, for which there is no library that fits both Debian's kernel and Python; and `iptables`, which has
neither concatenated sets nor transactions over two families.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import trio

from volant.host import Host

from ._backend import NetworkFailed

MISSING = "nft is not installed; run `apt install nftables`"
_TIMEOUT_S = 20.0
_MAX_ERROR = 600
"""Maximum characters of nft's error in a message."""
_MAX_LISTED = 64 * 1024 * 1024
_NO_SUCH_OBJECT = b"No such file or directory"
"""A message of nft. It exits with status 1 for this as for every other failure."""
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
"""A search path with `sbin`, which an ordinary user's PATH lacks."""


def nft() -> str | None:
    """Returns the path of `nft`; None if it is not installed."""
    return shutil.which("nft", path=f"{os.environ.get('PATH', '')}:{_PATH}")


async def load(host: Host, rules: str, *, only_check: bool = False) -> None:
    """Loads rules, or asks the kernel whether it would accept them.

    :raises NetworkFailed: when they are refused; nothing has changed then.
    """
    status, said = await _run(host, [*(["--check"] if only_check else []), "-f", "-"], rules)
    if status != 0:
        raise NetworkFailed("firewall", f"nft refuses the firewall's rules: {_text(status, said)}")


async def listed(host: Host, what: str) -> Sequence[Mapping[str, Any]]:
    """Returns an object in the kernel as nftables' JSON; empty if there is no such object.

    :raises NetworkFailed: when nft can't be run or fails.
    """
    status, said = await _run(host, ["-j", "list", *what.split()])
    if status != 0:
        if _NO_SUCH_OBJECT in said:
            return ()
        raise NetworkFailed("firewall", f"nft can't list {what}: {_text(status, said)}")
    try:
        return msgspec.json.decode(said, type=_Listing).nftables
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise NetworkFailed("firewall", f"nft's list of {what} can't be read: {error}") from error


class _Listing(msgspec.Struct):
    nftables: list[dict[str, Any]]


def _text(status: int, said: bytes) -> str:
    return said.decode(errors="replace").strip()[:_MAX_ERROR] or f"status {status}"


async def _run(host: Host, words: Sequence[str], stdin: str = "") -> tuple[int, bytes]:
    program = nft()
    if program is None:
        raise NetworkFailed("firewall", MISSING)
    try:
        return await host.processes.run(
            [program, *words],
            env={"PATH": _PATH, "LC_ALL": "C.UTF-8"},
            cwd=Path("/"),
            timeout_s=_TIMEOUT_S,
            output_limit=_MAX_LISTED,
            stdin=stdin.encode(),
        )
    except trio.TooSlowError:
        raise NetworkFailed("firewall", f"nft did not end within {_TIMEOUT_S:g} s and was killed") from None
    except OSError as error:
        raise NetworkFailed("firewall", f"{program} can't be run: {error}") from error
