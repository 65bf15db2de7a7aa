"""Boots a VM, runs a command in it several times at once, and deletes it: the client in thirty lines.

python examples/parallel.py [http://127.0.0.1:7777]
"""

from __future__ import annotations

import sys

import trio

from volant.client import Client
from volant.model import CreateVm

NAME = "example-parallel"


async def main(base_url: str) -> None:
    """Prints the output of each command."""
    async with Client(base_url) as client:
        try:
            waited = await client.vms.create_and_wait(CreateVm(name=NAME, cpu_cores=1, memory_mb=256), timeout_s=180)
            if waited.outcome != "met":
                sys.exit(f"the VM did not come up: {waited}")
            async with trio.open_nursery() as nursery:
                for number in range(4):
                    nursery.start_soon(say, client, number)
        finally:
            # Delete the VM even if a command failed.
            with trio.move_on_after(90, shield=True):
                await client.vms.delete(NAME)


async def say(client: Client, number: int) -> None:
    """Runs one command and stores its output."""
    async with client.vms.exec(NAME, ["sh", "-c", f"echo hello {number} from $(uname -r)"], timeout_s=60) as process:
        output = b"".join([piece.data async for piece in process])
        print(output.decode().strip(), process.end)


if __name__ == "__main__":
    trio.run(main, sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:7777")
