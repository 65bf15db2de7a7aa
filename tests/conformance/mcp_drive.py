"""Drives the MCP server at the URL argv[1] with an official Python client, using the VM named argv[2].

The Python that runs this has the client of the old or the new protocol. It prints its observations as one JSON value.
"""

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from datetime import timedelta
from typing import Any

import mcp


async def main(url: str, name: str) -> None:
    progress: list[str | None] = []

    async def told(_progress: float, _total: float | None, message: str | None) -> None:
        progress.append(message)

    async with AsyncExitStack() as stack:
        session: Any
        if hasattr(mcp, "Client"):
            session = await stack.enter_async_context(mcp.Client(url, read_timeout_seconds=180))
            version = session.protocol_version
        else:
            from mcp.client.streamable_http import streamablehttp_client  # type: ignore[attr-defined]  # mcp 1

            read, write, _ = await stack.enter_async_context(streamablehttp_client(url))
            wait = timedelta(seconds=180)
            session = await stack.enter_async_context(mcp.ClientSession(read, write, wait))  # type: ignore[arg-type]
            version = (await session.initialize()).protocolVersion

        async def call(tool: str, **arguments: Any) -> Any:
            listener = told if tool == "vms_create" else None
            result = await session.call_tool(tool, arguments, progress_callback=listener)
            return result.model_dump(mode="json", by_alias=True)

        tools = await session.list_tools()
        created = await call("vms_create", name=name, cpu_cores=1, memory_mb=128, timeout_s=120)
        ran = await call(
            "vms_exec", vm=name, command=["sh", "-c", "echo said >/dev/console; echo out; echo err >&2; exit 3"]
        )
        await call("vms_write_file", vm=name, path="/tmp/note", content="grüße\n")
        read_back = await call("vms_read_file", vm=name, path="/tmp/note")
        long = await call("vms_exec", vm=name, command=["seq", "100000"])
        logs = await call("vms_logs", vm=name, tail=5)
        resource = await session.read_resource(f"volant://vms/{name}/logs")
        deleted = await call("vms_delete", vm=name)
        missing = await call("vms_get", vm=name)
    seen = {
        "version": version,
        "tools": [tool.name for tool in tools.tools],
        "progress": progress,
        "created": created["structuredContent"],
        "ran": ran["structuredContent"],
        "read": read_back["structuredContent"],
        "long": long["structuredContent"],
        "long_text": long["content"][0]["text"],
        "logs": logs["structuredContent"],
        "resource": resource.contents[0].text,
        "deleted": deleted["structuredContent"],
        "missing": missing,
    }
    print(json.dumps(seen))


asyncio.run(main(*sys.argv[1:3]))
