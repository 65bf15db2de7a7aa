"""An agent that dies in its guest is restarted, and so is its workload."""

from __future__ import annotations

import trio

from tests.system.kit import Daemon, next_event, reachable, run, spec
from volant.client import ClientError, LogLine

TALKER = """
import os, sys, time
print("begins", os.environ["COLOUR"], flush=True)
time.sleep(10000)
"""
# The oldest Python process except PID 1.
KILL = "kill -9 $(pidof python3.13 | tr ' ' '\\n' | sort -n | grep -vx 1 | head -n 1); sleep 60"


async def test_a_killed_agent_comes_back_with_its_workload(daemon: Daemon) -> None:
    async with daemon.client() as client:
        workload = {"entrypoint": ["python3.13", "-c", TALKER], "env": {"COLOUR": "red"}}
        await client.plugins.install({"name": "talker", "version": "1", "workload": workload})
        waited = await client.vms.create_and_wait(spec("demo", plugin="talker", env={"COLOUR": "blue"}))
        assert waited.outcome == "met"
        newest = await client.newest_event()
        async with client.vms.logs("demo", since=0, streams=["stdout"]) as log:
            for _ in range(2):
                with trio.fail_after(30):
                    line = await log.receive()
                assert isinstance(line, LogLine)
                assert line.line == "begins blue"
                try:
                    await run(client, "demo", "sh", "-c", KILL)
                except (ClientError, AssertionError) as error:
                    print(f"as it should: {error}")
            with trio.fail_after(30):
                line = await log.receive()
            assert isinstance(line, LogLine)
            assert line.line == "begins blue"
            await reachable(client, "demo")
            health = (await client.vms.agent_health("demo"))["workload"]
            assert health["state"] == "healthy"
        async with client.events(after=newest, vm="demo") as feed:
            # The workload was started again. The VM did not change.
            while True:
                event = await next_event(feed)
                assert event.type.startswith("WORKLOAD_"), event
                assert event.workload is not None
                if event.type == "WORKLOAD_STARTED" and event.workload.pid == health["pid"]:
                    break
