"""Derives tools from operations, so that their arguments and results can't differ from REST.

A tool takes one flat object: the names in the path, the parameters of the query, the members of the body, and whether
to wait. Its result is an object, as the protocol requires: a list comes with the number of omitted items, and an
operation without a result reports its action.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import msgspec
import trio
from msgspec import UNSET

from volant.http import Nothing
from volant.journal import EventGap, VmChanged, VmCreated, VmForked
from volant.model import Name, Problem, VmView
from volant.operations import Operation, Page, Table, Tool as Declared, begin, name_target, show, wait_for

from ._text import fitting
from ._tool import DEFAULT_S, Link, MissingHosts, Result, Seconds, Tool, ToolCall, log_link

Outcome = Literal["done", "failed", "under_way"]
_OUTCOMES: dict[str, Outcome] = {"met": "done", "failed": "failed", "timeout": "under_way"}


class ChangedVm(msgspec.Struct, frozen=True):
    """A VM after a change."""

    vm: VmView
    outcome: Outcome
    """`done`: it is in the requested state. `failed`: it ended in another state, see `vm.reason`. `under_way`: it has
    not reached the state yet."""


class ForkedVms(msgspec.Struct, frozen=True):
    """Copies of a VM."""

    vms: list[VmView]
    outcome: Outcome
    """`done`: all are running. `failed`: at least one did not start, see its `reason`. `under_way`: some are still
    starting."""


class Deleted(msgspec.Struct, frozen=True):
    """The deleted object."""

    name: str
    deleted: Literal[True] = True


class Done(msgspec.Struct, frozen=True, omit_defaults=True):
    """The action and its arguments."""

    done: str
    name: str = ""


def derived_tools(table: Table) -> Iterator[Tool]:
    """Yields the tools of a table, in its order."""
    for operation in table:
        for declared in operation.tools:
            yield _tool(operation, declared)


def _tool(operation: Operation, declared: Declared) -> Tool:
    assert operation.client is not None
    waits = operation.waits_for is not None and operation.method != "GET"
    path = _argument_names(operation)
    body = declared.body or (None if operation.body in (None, Nothing) else operation.body)
    takes = msgspec.defstruct(
        operation.name,
        [
            *((name, Name) for name in path),
            *(
                (name, _described(each.tool_type, each.help), _default(operation.defaults[name], each.tool_type))
                for name, each in operation.query.items()
            ),
            *(
                (name, _described(Name | None, f"Only results whose `{member}` is this."), None)
                for name, member in declared.only.items()
            ),
            *(_WAITING if waits else ()),
        ],
        bases=None if body is None else (body,),
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
    )
    gives, present = _presenter(operation)

    async def run(call: ToolCall, wanted: Any) -> Result[Any]:
        parameters = {name: _value(getattr(wanted, name), name, operation) for name in operation.query}
        if body is not None:
            parameters["body"] = body(**{name: getattr(wanted, name) for name in body.__struct_fields__})
        assert operation.call is not None
        arguments = [getattr(wanted, name) for name in path]
        name_target(arguments, parameters.get("body"))
        await begin(call, operation)
        result = await operation.call(call, *arguments, **parameters)
        if waits:
            return await _settled(call, operation, result, wanted)
        if declared.only or declared.last_first:
            result = _selected(declared, result, wanted)
        return present(call, result, arguments)

    return Tool(
        name=declared.name or operation.client.replace(".", "_"),
        title=declared.title or operation.summary,
        description=declared.description or f"{operation.summary}. {operation.details}".rstrip(),
        takes=takes,
        gives=gives,
        run=run,
        operation=operation.name,
        read_only=operation.method == "GET",
        destructive=declared.destructive,
        idempotent=declared.idempotent,
    )


def _selected(declared: Declared, found: list[Any], wanted: Any) -> list[Any]:
    """Returns the objects that the arguments select. :raises Problem: 404, none has the name."""
    for argument, member in declared.only.items():
        if (value := getattr(wanted, argument)) is not None:
            found = [one for one in found if getattr(one, member) == value]
            if member == "name" and not found:
                raise Problem(404, f"{argument}-not-found", f"there is no {argument} named {value!r}")
    return found[::-1] if declared.last_first else found


def _described(of: Any, text: str) -> Any:
    return Annotated[of, msgspec.Meta(description=text)]


_WAITING = (
    ("wait", _described(bool, "Answer once the operation is complete or has failed."), True),
    (
        "timeout_s",
        _described(Seconds, "Maximum wait. The operation continues afterwards; check with vms_get."),
        DEFAULT_S,
    ),
)
"""Arguments of tools that wait for a state."""


def _argument_names(operation: Operation) -> tuple[str, ...]:
    """Returns the arguments for the names in the path: the `{name}` of `/vms/{name}` is `vm`."""
    found = re.findall(r"/(\w+)s/{(\w+)}", operation.path)
    return tuple(resource if name == "name" else name for resource, name in found)


def _default(value: Any, of: Any) -> Any:
    if isinstance(value, tuple):
        return [] if getattr(of, "__origin__", None) is list else None
    return value


def _value(value: Any, name: str, operation: Operation) -> Any:
    """Returns an argument in the operation's form: a model may pass one name where a query may repeat it."""
    if value is None and isinstance(operation.defaults[name], tuple):
        return ()
    return (value,) if isinstance(value, str) and isinstance(operation.defaults[name], tuple) else value


def _presenter(operation: Operation) -> tuple[type[msgspec.Struct], Callable[[ToolCall, Any, list[str]], Result[Any]]]:
    """Returns the type of a tool's result, and the function that creates it from the operation's result."""
    assert operation.client is not None
    resource = operation.client.partition(".")[0]
    if operation.waits_for is not None and operation.method != "GET":
        many = operation.answers[operation.status].type == list[VmView]
        return (ForkedVms if many else ChangedVm), lambda call, result, arguments: Result(Done(operation.summary))
    answer = operation.answers[operation.status].type
    if answer is None and operation.method == "DELETE":
        return Deleted, lambda call, result, arguments: Result(Deleted(arguments[-1]))
    if answer is None:
        return Done, lambda call, result, arguments: Result(Done(operation.summary, " ".join(arguments)))
    if getattr(answer, "__origin__", None) is not list:
        return answer, lambda call, result, arguments: Result(show(result).view, links=_links(result))
    if operation.query.keys() >= {"limit", "cursor"}:
        pages = msgspec.defstruct(
            "Page",
            [
                (resource, answer),
                (
                    "total",
                    _described(int | None, "The number of matches on all pages; null if only some hosts were asked."),
                ),
                ("next_cursor", _described(int | None, "Null on the last page."), None),
                *(_MISSING if operation.spans else ()),
            ],
            frozen=True,
        )

        def page(call: ToolCall, result: Page[Any], arguments: list[str]) -> Result[Any]:
            items = fitting(result.items)
            next_cursor = result.cursors[len(items) - 1] if len(items) < len(result.items) else result.next_cursor
            return Result(pages(items, result.total, next_cursor, **_missing(call)))

        return pages, page
    lists = msgspec.defstruct(
        "Items",
        [
            (resource, answer),
            ("left_out", _described(int, "The number of items that did not fit.")),
            *(_MISSING if operation.spans else ()),
        ],
        frozen=True,
    )

    def some(call: ToolCall, result: list[Any], arguments: list[str]) -> Result[Any]:
        items = fitting(result)
        return Result(lists(items, len(result) - len(items), **_missing(call)))

    return lists, some


_MISSING = (("missing_hosts", MissingHosts, UNSET),)


def _missing(call: ToolCall) -> dict[str, Any]:
    return {"missing_hosts": sorted(call.missing_hosts)} if call.missing_hosts else {}


def _links(result: Any) -> tuple[Link, ...]:
    return (log_link(result.vm.name),) if isinstance(result, (VmChanged, VmCreated)) else ()


async def _settled(call: ToolCall, operation: Operation, result: Any, wanted: Any) -> Result[Any]:
    """Returns the VMs, with `wait` once they have reached the operation's state, have failed, or the timeout is
    over."""
    state = operation.waits_for
    assert state is not None
    views = result.copies if isinstance(result, VmForked) else (result.vm,)
    outcome: Outcome = "done" if all(vm.status == state for vm in views) else "under_way"
    if wanted.wait:
        ids = frozenset(vm.id for vm in views)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_report_events, call, ids)
            result, waited = await wait_for(call, result, {state}, wanted.timeout_s)
            nursery.cancel_scope.cancel()
        outcome = _OUTCOMES[waited]
    failed = outcome == "failed"
    if isinstance(result, VmForked):
        links = tuple(log_link(vm.name) for vm in result.copies)
        return Result(ForkedVms(list(result.copies), outcome), links=links, failed=failed)
    name = result.vm.name
    if wanted.wait and call.deps.store.projection.by_id(result.vm.id) is None:
        raise Problem(409, "vm-deleted", f"VM {name!r} was deleted meanwhile", vm=name)
    return Result(ChangedVm(result.vm, outcome), links=(log_link(name),), failed=failed)


async def _report_events(call: ToolCall, ids: frozenset[int]) -> None:
    async with call.deps.store.events.cursor(call.since) as cursor:
        while taken := await cursor.take():
            if not isinstance(taken, EventGap):
                for frame in taken:
                    if frame.event.vm_id in ids:
                        call.report(f"{frame.event.name}: {frame.event.message}")
