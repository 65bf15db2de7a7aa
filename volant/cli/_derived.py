"""Derives commands from the client's methods, for operations that need no special output.

A group calls `add_commands` after it has defined its own commands: each method without one gets a command of the same
name, with an option for each parameter.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection
from typing import Any

import click
import msgspec

from volant.model import VmView

from ._complete import NAMES
from ._run import Duration, Pair, Session, command
from ._text import safe
from ._vm_output import done as say
from ._vms_group import timeout_option, wait_for_outcome, wait_option

_HOW: dict[str, dict[str, Any]] = {
    "bool": {"is_flag": True},
    "int | None": {"type": int},
    "float | None": {"type": Duration()},
    "Collection[str]": {"multiple": True},
    "str | Sequence[str] | None": {"multiple": True},
    "Mapping[str, str] | None": {"multiple": True, "type": Pair()},
}
"""The arguments of `click.option` for each annotation of a parameter."""
_SENT_ONCE = "a key of your own: sent again with it, the request is not carried out again"
_DONE = {"delete": "deleted"}
"""Verbs for the report of a method without a result; others are reported as done."""


def add_commands(group: click.Group, resource: str, operations: Any, besides: Collection[str] = ()) -> None:
    """Adds a command for each method of `operations` for which `group` has none.

    :param resource: the client's attribute with these methods, such as `networks`
    :param besides: methods whose command has another name
    """
    there = group.list_commands(click.Context(group))
    for name, method in vars(operations).items():
        if inspect.iscoroutinefunction(method) and name not in besides and _dashed(name) not in there:
            _add(group, resource, name, method, operations.waits_for.get(name))


def _add(group: click.Group, resource: str, name: str, method: Any, to: str | None) -> None:
    """Adds a command. `to` is the status that the VM reaches afterwards."""
    text = inspect.cleandoc(method.__doc__ or "")
    summary, *more = [part for part in text.split("\n\n") if not part.startswith(":param")]
    helps = {"idempotency_key": _SENT_ONCE, **dict(re.findall(r":param (\w+): (.*(?:\n    .*)*)", text))}
    parameters = list(inspect.signature(method).parameters.values())[1:]
    noun = resource.removesuffix("s")

    async def run(session: Session, /, wait: bool = False, timeout: float = 0, **given: Any) -> int | None:
        positional = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        if given.get("request") is not None:
            given["request"] = _json(given["request"])
        arguments = [given.pop(name) for name in positional]
        keywords = {key: _value(value) for key, value in given.items() if value not in (None, ())}
        if wait and to is not None:
            command: Any = _dashed(name)
            (vm,) = arguments
            return wait_for_outcome(
                session,
                vm,
                lambda client: client.vms.apply_and_wait(vm, command, [to], timeout_s=timeout, **keywords),
                to,
                timeout,
            )
        result = await getattr(getattr(session.client, resource), name)(*arguments, **keywords)
        _print(session, noun, name, arguments, result)
        return None

    for parameter in reversed(parameters):
        run = _option(parameter, helps.get(parameter.name, ""), resource)(run)
    if to is not None:
        run = wait_option(timeout_option(run))
    command(group, _dashed(name), help="\n\n".join([summary, *more]))(run)


def _option(parameter: inspect.Parameter, text: str, resource: str) -> Any:
    key, kind = parameter.name, str(parameter.annotation)
    if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
        if key == "request":
            required = parameter.default is inspect.Parameter.empty
            return click.option("--data", "request", required=required, help=f"JSON: a {kind.partition(' ')[0]}.")
        complete = NAMES.get(resource) if key in ("name", resource[:-1]) else None
        return click.argument(key, shell_complete=complete, required=parameter.default is inspect.Parameter.empty)
    flag, words = _dashed(key.removesuffix("_s")), " ".join(text.split())
    return click.option(f"--{flag}", key, help=f"{words[:1].upper()}{words[1:]}.", **_HOW.get(kind, {}))


def _json(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--data is not JSON: {error}") from None


def _value(value: Any) -> Any:
    """Returns a value in the client's form: pairs become a mapping."""
    return dict(value) if isinstance(value, tuple) and value and isinstance(value[0], tuple) else value


def _print(session: Session, noun: str, name: str, arguments: list[Any], result: Any) -> None:
    out = session.out
    if result is None:
        done = _DONE.get(name, "done")
        of = " ".join([noun, *arguments]) if name in _DONE else " ".join([noun, _dashed(name), *arguments])
        out.result({noun: " ".join(arguments), done: True}, f"{safe(of)} is {done}")
    elif isinstance(result, VmView):
        say(out, result, f"is {result.status}")
    elif out.json:
        out.document(result)
    else:
        shown = msgspec.to_builtins(result)
        out.nested(shown if isinstance(shown, dict) else {noun: shown})


def _dashed(name: str) -> str:
    return name.replace("_", "-")
