"""Loads nftables rules with the program `nft`: it applies a text in one transaction, or names the line that is wrong.

Rejected: netlink, for which there is no library that fits both Debian's kernel and Python; and `iptables`, which has
neither concatenated sets nor transactions over two families.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import trio

from volant.host import Host

from ._backend import NetworkFailed

MISSING = "nft is not installed; run `apt install nftables`"
_TIMEOUT_S = 20.0
_MAX_ERROR = 600
"""Characters of nft's error in a message."""
_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
"""An ordinary user's PATH has no `sbin`."""


def nft() -> str | None:
    """Returns the path of `nft`; None if it is not installed."""
    return shutil.which("nft", path=f"{os.environ.get('PATH', '')}:{_PATH}")


async def load(host: Host, rules: str, *, only_check: bool = False) -> None:
    """Loads rules, or asks the kernel whether it would accept them.

    :raises NetworkFailed: when they are refused; nothing has changed then.
    """
    program = nft()
    if program is None:
        raise NetworkFailed("firewall", MISSING)
    try:
        status, said = await host.processes.run(
            [program, *(["--check"] if only_check else []), "-f", "-"],
            env={"PATH": _PATH, "LC_ALL": "C.UTF-8"},
            cwd=Path("/"),
            timeout_s=_TIMEOUT_S,
            stdin=rules.encode(),
        )
    except trio.TooSlowError:
        raise NetworkFailed("firewall", f"nft did not end within {_TIMEOUT_S:g} s and was killed") from None
    except OSError as error:
        raise NetworkFailed("firewall", f"{program} can't be run: {error}") from error
    if status != 0:
        text = said.decode(errors="replace").strip()[:_MAX_ERROR] or f"status {status}"
        raise NetworkFailed("firewall", f"nft refuses the firewall's rules: {text}")
