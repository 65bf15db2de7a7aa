"""nftables, through its own program: it takes a text in one transaction, or says which line it does not take.

Rejected: its netlink protocol, for which there is no library that Debian's kernel and Python both have; and `iptables`,
which knows neither concatenated sets nor transactions over two families.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import trio

from volant.host import Host

from ._backend import NetworkFailed

MISSING = "nft is not installed; `apt install nftables` brings it"
_TIMEOUT_S = 20.0
_SHOWN = 600
_WHERE = "/usr/sbin:/usr/bin:/sbin:/bin"
"""An ordinary user's PATH has no `sbin`."""


def nft() -> str | None:
    """Where the program is; None: it is not installed."""
    return shutil.which("nft", path=f"{os.environ.get('PATH', '')}:{_WHERE}")


async def load(host: Host, rules: str, *, only_check: bool = False) -> None:
    """Hand rules over. :raises NetworkFailed: they are not taken, none of them, and why.

    `only_check`: the kernel says whether it would take them, and changes nothing.
    """
    program = nft()
    if program is None:
        raise NetworkFailed("firewall", MISSING)
    try:
        status, said = await host.run_program(
            [program, *(["--check"] if only_check else []), "-f", "-"],
            env={"PATH": _WHERE, "LC_ALL": "C.UTF-8"},
            cwd=Path("/"),
            timeout_s=_TIMEOUT_S,
            stdin=rules.encode(),
        )
    except trio.TooSlowError:
        raise NetworkFailed("firewall", f"nft did not end within {_TIMEOUT_S:g} s, and was killed") from None
    except OSError as error:
        raise NetworkFailed("firewall", f"{program} can't be run: {error}") from error
    if status != 0:
        text = said.decode(errors="replace").strip()[:_SHOWN] or f"status {status}"
        raise NetworkFailed("firewall", f"nft does not take the firewall's rules: {text}")
