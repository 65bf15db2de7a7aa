"""The tools and resources as a server of the official `mcp` package, which this module imports."""

from __future__ import annotations

import base64
import logging
import re
from collections import deque
from functools import partial
from typing import Any
from urllib.parse import unquote

import msgspec
import trio
from mcp.server.caching import CacheHint
from mcp.server.context import ServerRequestContext
from mcp.server.lowlevel.server import Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    BlobResourceContents,
    CallToolRequestParams,
    CallToolResult,
    ContentBlock,
    ImageContent,
    ListResourcesResult,
    ListResourceTemplatesResult,
    ListToolsResult,
    PaginatedRequestParams,
    ReadResourceRequestParams,
    ReadResourceResult,
    Resource,
    ResourceLink,
    ResourceTemplate,
    TextContent,
    TextResourceContents,
    Tool as ToolEntry,
    ToolAnnotations,
)

from volant import __version__
from volant.http import Limits, decode, first_problem, internal_error
from volant.logs import LogGap
from volant.model import Caller, Key, LogLine, Problem, VmRow, is_name
from volant.operations import TABLE, ApiDeps, Table, acting, find_vm, name_target, open_log, standalone, vms

from . import _guest
from ._text import MAX_TEXT, clip
from ._tool import Result, Tool, ToolCall, log_link, vm_uri
from ._tools import READ_BY, RESOURCE, tools

Context = ServerRequestContext[Any, Any]

_log = logging.getLogger("volant.api")
# At INFO it logs each request, as our own log does.
logging.getLogger("mcp").setLevel(logging.WARNING)

_INSTRUCTIONS = (
    "Volant runs Linux microVMs on one or several hosts. Create one with vms_create, which answers when it has booted; "
    "work in it with vms_exec, vms_read_file and vms_write_file; remove it with vms_delete when you are done. Other "
    "people's VMs may be on the same hosts: use only those that you created or that the user named. When something "
    "fails, vms_get shows the reason and vms_logs the console."
)
_REPORT_S = 10.0
"""The interval of progress reports of a call, for clients that want them."""
_PAGE = 100
_LOG_LINES = 10_000
_LATER = CacheHint(ttl_ms=300_000, scope="public")
_LATER_FOR_CALLER = CacheHint(ttl_ms=300_000, scope="private")

_VOLAR = re.compile(r"`volar ([a-z]+) ([a-z]+)[^`]*`")
"""A command in a hint: `volar vms start demo`."""
_TOOL_NAMES = frozenset(tool.name for tool in tools(TABLE))

_encode = msgspec.json.Encoder().encode


class McpServer:
    """Serves requests, also many at once; it keeps no state between them."""

    def __init__(self, deps: ApiDeps, table: Table = TABLE) -> None:
        self._deps = deps
        self._table = table
        self._tools = {tool.name: tool for tool in tools(table)}
        self._entries = [_entry(tool) for tool in self._tools.values()]
        schemas = {entry.name: entry.input_schema for entry in self._entries}
        self._server: Server[Any] = Server(
            "volant",
            version=__version__,
            title="Volant",
            description="MicroVMs on one or several hosts",
            instructions=_INSTRUCTIONS,
            cache_hints={
                "tools/list": _LATER_FOR_CALLER,
                "resources/templates/list": _LATER,
                "server/discover": _LATER,
            },
            get_tool_input_schema=schemas.get,
            on_list_tools=self._list_tools,
            on_call_tool=self._call_tool,
            on_list_resources=self._list_resources,
            on_list_resource_templates=self._list_templates,
            on_read_resource=self._read_resource,
        )

    async def serve(self, scope: Any, receive: Any, send: Any, *, streams: bool) -> None:
        """Serves one ASGI request; with `streams` the client accepts an event stream."""
        manager = StreamableHTTPSessionManager(
            self._server, json_response=not streams, stateless=True, max_request_body_size=Limits().json_body
        )
        async with manager.run():
            await manager.handle_request(scope, receive, send)

    async def _list_tools(self, context: Context, params: PaginatedRequestParams | None) -> ListToolsResult:
        caller = self._call(context).caller
        return ListToolsResult(tools=[entry for entry in self._entries if self._may_call(caller, entry.name)])

    async def _call_tool(self, context: Context, params: CallToolRequestParams) -> CallToolResult:
        tool = self._tools.get(params.name)
        if tool is None:
            raise MCPError(INVALID_PARAMS, f"there is no tool {params.name[:80]!r}")
        call = self._call(context)
        answer: CallToolResult | None = None
        try:
            async with acting(call, self._table[tool.operation]):
                arguments = _arguments(tool, params)
                name_target([vm] if isinstance(vm := getattr(arguments, "vm", None), str) else [], None)
                async with trio.open_nursery() as nursery:
                    if context.meta is not None and "progress_token" in context.meta:
                        nursery.start_soon(_report, call, context)
                    answer = _success(await tool.run(call, arguments))
                    nursery.cancel_scope.cancel()
        except* Problem as group:
            answer = _failure(first_problem(group))
        except* Exception as group:
            _log.error("request %s failed in %s", _request_id(context), tool.name, exc_info=group)
            answer = _failure(internal_error())
        assert answer is not None
        return answer

    async def _list_resources(self, context: Context, params: PaginatedRequestParams | None) -> ListResourcesResult:
        after = params.cursor if params is not None else None
        if after is not None and (not after.isascii() or not after.isdecimal() or len(after) > 18):
            raise MCPError(INVALID_PARAMS, "the cursor is not one of this server's")
        page = await vms.list_vms(self._call(context), limit=_PAGE, cursor=int(after or 0))
        resources = []
        for vm in page.items:
            link = log_link(vm.name)
            resources.append(
                Resource(name=vm.name, title=f"VM {vm.name}", uri=vm_uri(vm.name), mime_type="application/json")
            )
            resources.append(Resource(name=f"{vm.name}/logs", title=link.name, uri=link.uri, mime_type=link.mime_type))
        following = None if page.next_cursor is None else str(page.next_cursor)
        return ListResourcesResult(resources=resources, next_cursor=following)

    async def _list_templates(
        self, context: Context, params: PaginatedRequestParams | None
    ) -> ListResourceTemplatesResult:
        return ListResourceTemplatesResult(
            resource_templates=[
                ResourceTemplate(
                    name="vm", title="A VM", uri_template="volant://vms/{vm}", mime_type="application/json",
                    description="The VM, as vms_get returns it",
                ),
                ResourceTemplate(
                    name="logs", title="The log of a VM", uri_template="volant://vms/{vm}/logs",
                    mime_type="text/plain", description="The newest output of console and workload, up to 1 MiB",
                ),
                ResourceTemplate(
                    name="file", title="A file in a VM", uri_template="volant://vms/{vm}/files{+path}",
                    description="A file of up to 1 MiB, by its absolute path; the VM must run",
                ),
            ]
        )  # fmt: skip

    async def _read_resource(self, context: Context, params: ReadResourceRequestParams) -> ReadResourceResult:
        uri = str(params.uri)
        try:
            return ReadResourceResult(contents=[await self._read(self._call(context), uri)])
        except Problem as problem:
            raise MCPError(INVALID_PARAMS, _text(problem), {"uri": uri[:4096]}) from None

    async def _read(self, call: ToolCall, uri: str) -> TextResourceContents | BlobResourceContents:
        found = RESOURCE.match(uri)
        vm, what, path = found.groups("") if found else ("", "", "")
        if not is_name(vm) or bool(path) != (what == "files"):
            raise Problem(404, "not-found", f"there is no resource {uri[:200]!r}")
        async with acting(call, self._table[READ_BY[what]], vm):
            return await self._read_of_vm(call, uri, call.named(vm), what, unquote(path))

    async def _read_of_vm(
        self, call: ToolCall, uri: str, vm: Key, what: str, path: str
    ) -> TextResourceContents | BlobResourceContents:
        row = find_vm(self._deps, vm)
        if not what:
            text = _encode(row.view).decode()
            return TextResourceContents(uri=uri, mime_type="application/json", text=text)
        if what == "logs":
            text = await _log_text(call, row)
            return TextResourceContents(uri=uri, mime_type="text/plain", text=text)
        limit = _guest.MAX_BLOB
        read = await call.until(lambda: _guest.read_file(self._deps, row.key, path, limit=limit))
        if not read.ended:
            raise Problem(413, "file-too-large", f"{path} is larger than {limit} bytes: read parts with vms_read_file")
        data = read.data
        try:
            return TextResourceContents(uri=uri, mime_type="text/plain", text=data.decode())
        except UnicodeDecodeError:
            blob = base64.b64encode(data).decode("ascii")
            return BlobResourceContents(uri=uri, mime_type="application/octet-stream", blob=blob)

    def _may_call(self, caller: Caller, tool: str) -> bool:
        return caller.may(self._table[self._tools[tool].operation].permission)

    def _call(self, context: Context) -> ToolCall:
        assert context.request is not None
        return ToolCall(deps=self._deps, scope=context.request.scope)


async def _report(call: ToolCall, context: Context) -> None:
    """Reports the progress of a call, when it changes and every `_REPORT_S`."""
    began = trio.current_time()
    while True:
        with trio.move_on_after(_REPORT_S):
            await call.changed.wait()
        call.changed = trio.Event()
        await context.session.report_progress(round(trio.current_time() - began, 3), None, call.progress or "under way")


async def _log_text(call: ToolCall, row: VmRow) -> str:
    log = open_log(call.deps, row)
    lines: deque[str] = deque()
    size = 0
    async with log.cursor(tail=_LOG_LINES, follow=False) as cursor:
        while taken := await call.until(partial(cursor.take, 256 * 1024)):
            if isinstance(taken, LogGap):
                continue
            for frame in taken:
                line = msgspec.json.decode(frame, type=LogLine)
                lines.append(f"{line.timestamp:%Y-%m-%dT%H:%M:%S.%f}Z {line.stream} {line.line}\n")
                size += len(lines[-1])
                while size > _guest.MAX_BLOB:
                    size -= len(lines.popleft())
    return "".join(lines)


def _entry(tool: Tool) -> ToolEntry:
    gives = standalone(tool.gives)
    return ToolEntry(
        name=tool.name,
        title=tool.title,
        description=tool.description,
        input_schema=standalone(tool.takes),
        output_schema=gives,
        annotations=ToolAnnotations(
            title=tool.title,
            read_only_hint=tool.read_only,
            destructive_hint=tool.destructive,
            idempotent_hint=tool.idempotent or tool.read_only,
            open_world_hint=tool.open_world,
        ),
    )


def _arguments(tool: Tool, params: CallToolRequestParams) -> Any:
    """Decodes the arguments of a call. :raises Problem: 400 that names the field."""
    try:
        data = _encode(params.arguments or {})
    except (ValueError, OverflowError, RecursionError):
        # The package accepts half of a surrogate pair, and nesting as deep as the stack.
        raise Problem(400, "invalid-request", "the arguments are not Unicode, or nested too deeply") from None
    return decode(data, tool.takes, "the call")


def _success(result: Result[Any]) -> CallToolResult:
    encoded = _encode(result.value)
    content: list[ContentBlock] = [TextContent(type="text", text=clip(encoded.decode(), MAX_TEXT))]
    for image in result.images:
        data = base64.b64encode(image.data).decode("ascii")
        content.append(ImageContent(type="image", data=data, mime_type=image.mime_type))
    content.extend(
        ResourceLink(type="resource_link", uri=link.uri, name=link.name, mime_type=link.mime_type)
        for link in result.links
    )
    return CallToolResult(content=content, structured_content=msgspec.json.decode(encoded), is_error=result.failed)


def _failure(problem: Problem) -> CallToolResult:
    return CallToolResult(content=[TextContent(type="text", text=_text(problem))], is_error=True)


def _text(problem: Problem) -> str:
    hint = problem.hint and hint_for_a_model(problem.hint)
    return f"{problem.detail}\n{hint}" if hint else problem.detail


def hint_for_a_model(hint: str) -> str:
    """Returns a hint in which commands of `volar` are replaced by the equivalent tools.

    A command without a tool is kept and marked for the operator, as a model has no command line.
    """

    def tool(found: re.Match[str]) -> str:
        name = f"{found[1]}_{found[2]}"
        return f"`{name}`" if name in _TOOL_NAMES else f"{found[0]} (to be run by the operator)"

    return _VOLAR.sub(tool, hint)


def _request_id(context: Context) -> str:
    return str(_state(context)["request_id"])


def _state(context: Context) -> Any:
    assert context.request is not None
    return context.request.scope["state"]
