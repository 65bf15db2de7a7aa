"""Derives commands from the client's methods, which are those of the table of operations.

A group defines its special commands, says how its objects are shown, and calls `add_commands`: each other method
becomes a command of the same name, with an argument or option for each parameter, and for each member of a request.
`--wait`, `--timeout`, `--wide`, `-q` and `-o` follow from the methods, too.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import click
import msgspec

from volant.model import READY

from ._complete import NAMES
from ._lazy_group import Lazy, LazyGroup
from ._options import Size, listing
from ._output import Output
from ._run import Duration, Pair, Session, command
from ._shown import Sheet, label, show_list, show_one, text_of
from ._text import safe
from ._vms_group import timeout_option, wait_for_outcome, wait_option

if TYPE_CHECKING:
    from volant.client import Client, Waited

Show = Sheet | Callable[[Output, Any], int | None]
"""How objects of a type are shown; a function prints one itself, and may return the exit code of the command."""
Decorator = Callable[[Any], Any]

_SKIPPED = ("cursor", "limit", "registry_auth")
"""Parameters that are no options: a list is complete, and credentials are no arguments."""
_SENT_ONCE = "a key of your own: sent again with it, the request is not carried out again"


class Shown(NamedTuple):
    """How the commands of a group print what they get."""

    objects: Mapping[type, Show] = {}
    """By type; others are printed with all members."""
    said: Mapping[str, str | Callable[[Any], str]] = {}
    """By method: a sentence about the result, with its members and the first argument in braces, or a function that
    returns one; its text must be safe."""


def add_commands(
    group: LazyGroup,
    resource: str,
    operations: Any,
    shown: Shown = Shown(),  # noqa: B008 - never changed
    *,
    besides: Collection[str] = (),
    options: Mapping[str, Mapping[str, Decorator]] | None = None,
) -> None:
    """Adds a command for each method of `operations` for which `group` has none.

    :param resource: the client's attribute with these methods, such as `networks`
    :param besides: methods that are no commands of this group
    :param options: decorators of click for parameters and members with a special option, by method
    """
    there = group.list_commands(click.Context(group))
    for name, method in vars(operations).items():
        if inspect.iscoroutinefunction(method) and name not in besides and _dashed(name) not in there:
            group.lazy[_dashed(name)] = derived(resource, operations, name, shown, **(options or {}).get(name, {}))


def derived(
    resource: str,
    operations: Any,
    method: str,
    shown: Shown = Shown(),  # noqa: B008 - never changed
    /,
    **options: Decorator,
) -> Lazy:
    """Returns the command of one method, which is made when it is used."""
    text = inspect.cleandoc(getattr(operations, method).__doc__ or "")
    return Lazy(lambda: _Derived(resource, operations, method, shown, options).command(), text.partition("\n\n")[0])


class _Derived:
    """A command that calls a method of the client and prints the result."""

    def __init__(
        self, resource: str, operations: Any, method: str, shown: Shown, options: Mapping[str, Decorator]
    ) -> None:
        self._resource, self._method, self._shown, self._options = resource, method, shown, options
        self._noun = resource.removesuffix("s")
        self._function = getattr(operations, method)
        self._hints = get_type_hints(self._function, include_extras=True)
        given = list(inspect.signature(self._function).parameters.values())[1:]
        self._parameters = [each for each in given if each.name not in ("request", *_SKIPPED)]
        self._order = [each.name for each in given if each.kind is each.POSITIONAL_OR_KEYWORD]
        self._first = next((each for each in self._order if each != "request"), None)
        """The parameter that names an object, as an argument of the command."""
        self._paths: dict[str, tuple[str, ...]] = {}
        """The path of each member of the request, by the key of its option."""
        self._to: str | None = getattr(operations, "waits_for", {}).get(method)
        """The state that the VM reaches afterwards."""
        result = self._hints["return"]
        self._listed = get_args(result)[0] if get_origin(result) is Sequence else None
        """The type of the objects in the result, if it is a list."""

    def command(self) -> click.Command:
        text = inspect.cleandoc(self._function.__doc__ or "")
        helps = {"idempotency_key": _SENT_ONCE, **dict(re.findall(r":param (\w+): (.*(?:\n    .*)*)", text))}
        by_place = [each for each in self._parameters if each.name in self._order]
        by_name = [each for each in self._parameters if each.name not in self._order]
        decorators = [self._parameter(each, "") for each in by_place]
        if (hint := self._hints.get("request")) is not None:
            for key, path, decorator in _members(_struct(hint), self._order, self._options):
                self._paths[key] = path
                decorators.append(decorator)
        decorators += [self._parameter(each, helps.get(each.name, "")) for each in by_name]
        if self._listed is not None:
            decorators.append(listing)
            if self._sheet(self._listed).wide:
                decorators.append(click.option("--wide", is_flag=True, help="Show more columns."))
        if self._to is not None:
            decorators += [wait_option, timeout_option]

        async def run(session: Session, /, **given: Any) -> int | None:
            return await self._run(session, **given)

        for decorator in reversed(decorators):
            run = decorator(run)
        paragraphs = [each for each in text.split("\n\n") if not each.startswith(":param")]
        return command(None, _dashed(self._method), help="\n\n".join(paragraphs))(run)

    def _parameter(self, parameter: inspect.Parameter, text: str) -> Decorator:
        """Returns the argument or option for a parameter."""
        key, required = parameter.name, parameter.default is inspect.Parameter.empty
        if key in self._options:
            return self._options[key]
        if key != self._first:
            return _option(key, key, self._hints[key], text, required=required)
        complete = NAMES.get(self._resource) if key in ("name", self._noun) else None
        word = self._noun.upper() if key == "name" else key.upper()
        if self._method == "delete":
            return click.argument(key, metavar=f"{word}...", nargs=-1, required=True, shell_complete=complete)
        return click.argument(
            key, metavar=word if required else f"[{word}]", required=required, shell_complete=complete
        )

    async def _run(
        self, session: Session, /, *, wait: bool = False, timeout: float = 0, wide: bool = False, **given: Any
    ) -> int | None:
        # click gives None, False or an empty tuple for what is not on the command line.
        given = {key: value for key, value in given.items() if value is not None and value is not False and value != ()}
        given = {key: dict(value) if _are_pairs(value) else value for key, value in given.items()}
        if "request" in self._hints:
            given["request"] = self._body(given)
        call = getattr(getattr(session.client, self._resource), self._method)
        if self._method == "delete":
            for name in given.pop(str(self._first)):
                await call(name, **given)
                if session.out.json:
                    session.out.item({"name": name, "deleted": True})
                else:
                    session.out.line(f"{self._noun} {safe(name)} is deleted")
            return None
        arguments = [given.pop(key) for key in self._order if key in given]
        if wait and self._to is not None:
            # A VM that boots is to do its work.
            wanted = READY if self._method in ("start", "restart", "recover") else self._to
            change: Any = self._method
            (vm,) = arguments

            async def apply(client: Client) -> Waited:
                return await client.vms.apply_and_wait(vm, change, [wanted], timeout_s=timeout, **given)

            return wait_for_outcome(session, vm, apply, wanted, timeout)
        return self._print(session.out, arguments, await call(*arguments, **given), wide)

    def _body(self, given: dict[str, Any]) -> dict[str, Any]:
        """Takes the members of the request from the options, and returns it."""
        body: dict[str, Any] = {}
        for key, (*above, name) in self._paths.items():
            if key in given:
                into = body
                for each in above:
                    into = into.setdefault(each, {})
                into[name] = given.pop(key)
        return body

    def _print(self, out: Output, arguments: Sequence[Any], result: Any, wide: bool) -> int | None:
        said, show = self._shown.said.get(self._method), self._shown.objects.get(type(result))
        if said is None and self._method == "create":
            said = f"{self._noun} {{name}} is created"
        if callable(said):
            out.result(result, said(result))
        elif said is not None or result is None:
            self._say(out, said or "done", arguments, result)
        elif self._listed is not None:
            show_list(out, result, self._sheet(self._listed), wide=wide)
        elif show is not None and not isinstance(show, Sheet):
            return show(out, result)
        else:
            show_one(out, result, show or Sheet())
        return None

    def _say(self, out: Output, said: str, arguments: Sequence[Any], result: Any) -> None:
        """Prints a sentence with the members of the result, and the argument that names an object."""
        facts = {} if result is None else msgspec.structs.asdict(result)
        named = {} if self._first is None else {self._first: arguments[0]}
        if arguments:
            facts = {**named, self._noun: arguments[0], **facts}
        text = said.format_map({name: safe(text_of(name, value)) for name, value in facts.items()})
        out.result({**named, "done": True} if result is None else result, text)

    def _sheet(self, kind: type) -> Sheet:
        found = self._shown.objects.get(kind)
        return found if isinstance(found, Sheet) else Sheet()


def member_options(kind: type[msgspec.Struct]) -> Decorator:
    """Adds an option for each member of a struct to a command."""

    def decorate(function: Any) -> Any:
        for _, _, decorator in reversed(list(_members(kind, (), {}))):
            function = decorator(function)
        return function

    return decorate


def _members(
    kind: Any, taken: Collection[str], options: Mapping[str, Decorator], above: tuple[str, ...] = ()
) -> Iterator[tuple[str, tuple[str, ...], Decorator]]:
    """Yields key, path, and argument or option for each member of a struct, and of the structs in it.

    :param taken: keys that the parameters of the method have
    :param options: special ones, by key
    """
    for field in msgspec.structs.fields(kind):
        key, path = f"new_{field.name}" if field.name in taken else field.name, (*above, field.encode_name)
        inner = _struct(field.type)
        if inner is not None and key not in options:
            yield from _members(inner, taken, options, path)
        elif key in options:
            yield key, path, options[key]
        elif field.required and label(field.name) == field.name and (_plain(field.type)[0] in (str, int)):
            how = {**_how(field.name, field.type), "metavar": field.name.upper()}
            yield key, path, click.argument(key, **how)
        else:
            text = partial(_text_of_member, kind, field.name)
            yield key, path, _option(key, field.name, field.type, text, required=field.required)


def _option(key: str, name: str, hint: Any, text: str | Callable[[], str], *, required: bool) -> Decorator:
    """Returns the option for a parameter or member of a type. :raises TypeError: it can't be given as an option."""
    flag, how = _dashed(label(name)), _how(name, hint)
    if how.get("multiple"):
        flag = flag.removesuffix("s")
    return click.option(f"--{flag}", key, cls=_Option, text=text, required=required, **how)


class _Option(click.Option):
    """An option whose help is read when it is shown, because docstrings of members take long to find."""

    def __init__(self, *arguments: Any, text: str | Callable[[], str], **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._text = text

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        words = " ".join((self._text if isinstance(self._text, str) else self._text()).split()).removesuffix(".")
        text = words or label(self.name or "")
        self.help = f"{text[:1].upper()}{text[1:]}{'; may be repeated' if self.multiple else ''}."
        return super().get_help_record(ctx)


def _text_of_member(kind: type, name: str) -> str:
    from volant.model.docstrings import member_texts

    return (member_texts(kind) or {}).get(name, "")


def _how(name: str, hint: Any) -> dict[str, Any]:
    """Returns the arguments of `click.option` for a type, and the unit in the name of what it is for."""
    kind, low, high = _plain(hint)
    origin = get_origin(kind)
    if kind is bool:
        return {"is_flag": True}
    if name.endswith("_mb"):
        return {"type": Size(max(low or 0, 0)), "metavar": "SIZE"}
    if name.endswith("_s"):
        return {"type": Duration(), "metavar": "DURATION"}
    if kind is int:
        return {"type": click.IntRange(low, high) if (low, high) != (None, None) else int, "metavar": "N"}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return {"type": click.Choice([str(each.value) for each in kind])}
    if origin is Literal:
        return {"type": click.Choice(get_args(kind))}
    if origin is not None and issubclass(origin, Mapping):
        return {"multiple": True, "type": Pair(), "metavar": "KEY=VALUE"}
    if origin is not None and issubclass(origin, Collection):
        return {**_how(name, get_args(kind)[0]), "multiple": True}
    if kind is str:
        return {"metavar": "TEXT"}
    raise TypeError(f"{name} can't be an option of a command: {hint}")


def _plain(hint: Any) -> tuple[Any, int | None, int | None]:
    """Returns a type without None and without annotations, its minimum and its maximum."""
    low = high = None
    while (origin := get_origin(hint)) in (Annotated, Union, UnionType):
        if origin is not Annotated:
            # Of a single value and many, many.
            hint = [each for each in get_args(hint) if each is not NoneType][-1]
            continue
        hint, *more = get_args(hint)
        for meta in more:
            low, high = getattr(meta, "ge", None) or low, getattr(meta, "le", None) or high
    return hint, low, high


def _struct(hint: Any) -> Any:
    """Returns the struct that a type allows; None if there is none."""
    kinds = [hint, *get_args(hint)]
    return next((each for each in kinds if isinstance(each, type) and issubclass(each, msgspec.Struct)), None)


def _are_pairs(value: Any) -> bool:
    return isinstance(value, tuple) and isinstance(value[0], tuple)


def _dashed(name: str) -> str:
    return name.replace("_", "-").replace(" ", "-")
