"""A host for a daemon with real networks, and an internet that the test controls: two network namespaces and a link."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack, closing

from tests.processes import read_line
from tests.system.netns import Namespace

HOST, WORLD = "198.51.100.1", "198.51.100.2"
"""The host's address, and the address of its default gateway, which is the internet."""
_S = 30.0


class Lab:
    """A host, the internet, and a link between them."""

    def __init__(self, *addresses: str) -> None:
        """
        :param addresses: of the internet, besides `WORLD`
        """
        with ExitStack() as stack:
            self.host = stack.enter_context(closing(Namespace()))
            self.world = stack.enter_context(closing(Namespace()))
            peer = str(self.world.pid)
            self.host.run("ip", "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", peer)
            for end, address in ((self.host, HOST), (self.world, WORLD)):
                end.run("ip", "address", "add", f"{address}/24", "dev", "up0")
            for address in addresses:
                self.world.run("ip", "address", "add", f"{address}/32", "dev", "up0")
            for end in (self.host, self.world):
                end.run("ip", "link", "set", "up0", "up")
            self.host.run("ip", "route", "add", "default", "via", WORLD)
            self._stack = stack.pop_all()

    def start(self, *words: str) -> subprocess.Popen[str]:
        """Starts a Python program on the internet, and waits until it prints `ready`. It ends with the lab."""
        command = [*self.world.enter, sys.executable, *words]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._stack.callback(process.communicate, timeout=_S)
        self._stack.callback(process.kill)
        try:
            assert read_line(process) == "ready\n"
        except BaseException:
            self.close()
            raise
        return process

    def close(self) -> None:
        """Ends the programs and both namespaces."""
        self._stack.close()
