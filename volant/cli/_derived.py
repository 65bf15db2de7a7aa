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

from ._complete import NAMES
from ._run import Duration, Pair, Session, command
from ._text import safe

_HOW: dict[str, dict[str, Any]] = {
    "bool": {"is_flag": True},
    "int | None": {"type": int},
    "float | None": {"type": Duration()},
    "Collection[str]": {"multiple": True},
    "str | Sequence[str] | None": {"multiple": True},
    "Mapping[str, str] | None": {"multiple": True, "type": Pair()},
}
"""The arguments of `click.option` for each annotation of a parameter."""


def add_commands(group: click.Group, resource: str, operations: type, besides: Collection[str] = ()) -> None:
    """Adds a command for each method of `operations` for which `group` has none.

    :param resource: the client's attribute with these methods, such as `networks`
    :param besides: methods that have a command of another name
    """
    there = group.list_commands(click.Context(group))
    for name, method in vars(operations).items():
        if inspect.iscoroutinefunction(method) and name not in besides and _dashed(name) not in there:
            _add(group, resource, name, method)


def _add(group: click.Group, resource: str, name: str, method: Any) -> None:
    text = inspect.cleandoc(method.__doc__ or "")
    summary, *more = [part for part in text.split("\n\n") if not part.startswith(":param")]
    helps = dict(re.findall(r":param (\w+): (.*(?:\n    .*)*)", text))
    parameters = list(inspect.signature(method).parameters.values())[1:]
    noun = resource.removesuffix("s")

    async def run(session: Session, /, **given: Any) -> None:
        positional = [each.name for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        if given.get("request") is not None:
            given["request"] = _json(given["request"])
        arguments = [given.pop(name) for name in positional]
        keywords = {key: _value(value) for key, value in given.items() if value not in (None, ())}
        result = await getattr(getattr(session.client, resource), name)(*arguments, **keywords)
        _print(session, noun, name, arguments, result)

    for parameter in reversed(parameters):
        run = _option(parameter, helps.get(parameter.name, ""), resource)(run)
    command(group, _dashed(name), help="\n\n".join([summary, *more]))(run)


def _option(parameter: inspect.Parameter, text: str, resource: str) -> Any:
    key, kind = parameter.name, str(parameter.annotation)
    if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
        if key == "request":
            required = parameter.default is inspect.Parameter.empty
            return click.option("--data", "request", required=required, help=f"JSON: a {kind.partition(' ')[0]}.")
        complete = NAMES.get(resource) if key in ("name", resource[:-1]) else None
        return click.argument(key, shell_complete=complete, required=parameter.default is inspect.Parameter.empty)
    flag = _dashed(key.removesuffix("_s"))
    return click.option(f"--{flag}", key, help=f"{text[:1].upper()}{' '.join(text[1:].split())}.", **_HOW.get(kind, {}))


def _json(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"--data is not JSON: {error}") from None


def _value(value: Any) -> Any:
    """Returns a value as the client takes it: pairs become a mapping."""
    return dict(value) if isinstance(value, tuple) and value and isinstance(value[0], tuple) else value


def _print(session: Session, noun: str, name: str, arguments: list[Any], result: Any) -> None:
    out = session.out
    if result is None:
        done = f"{name}d" if name.endswith("e") else f"{name}ed"
        out.result({noun: arguments[0], done: True}, f"{noun} {safe(arguments[0])} is {done}")
    elif out.json:
        out.document(result)
    else:
        shown = msgspec.to_builtins(result)
        out.nested(shown if isinstance(shown, dict) else {noun: shown})


def _dashed(name: str) -> str:
    return name.replace("_", "-")
