"""Generates the client's methods from the table of operations as Python, for type checkers and editors.

`docs/build.py` writes the text to `volant/client/_operations.py`. The client can't import the table, which would import
the daemon.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterable
from types import UnionType
from typing import Any, Union, get_args, get_origin

import msgspec
from msgspec.structs import FieldInfo

from volant.http import Nothing

from ._parameters import QueryParameter
from ._table import JsonObject, OneOf, Operation, Table

_HEAD = '''"""Methods of the client, one for each operation that is a request and an answer.

Written by docs/build.py from the table of operations. Each has a deadline, and raises `ClientProblem` when the
daemon answers with an error, another `ClientError` when there is no usable answer. With an `idempotency_key` of your
own (1 to 255 visible ASCII characters) you can call a method again with the same arguments for 24 h, from another
process too, and get the first answer.
"""
'''


def client_module(table: Table) -> str:
    """Returns the source of the module."""
    resources: dict[str, list[Operation]] = {}
    for operation in table:
        if operation.call is not None and operation.client is not None:
            resources.setdefault(operation.client.partition(".")[0], []).append(operation)
    classes = [_class(resource, operations) for resource, operations in resources.items()]
    text = "\n\n\n".join(classes)
    used = sorted({name for operations in resources.values() for each in operations for name in _model_names(each)})
    named = ("body_of", "duration", "flag", "pairs", "part", "registry_headers", "words")
    helpers = sorted(name for name in named if re.search(rf"\b{name}\(", text))
    types = sorted(name for name in ("Collection", "Mapping", "Sequence") if re.search(rf"\b{name}\[", text))
    typed = [name for name in ("Any", "ClassVar") if re.search(rf"\b{name}\b", text)]
    lines = [
        _HEAD,
        "from __future__ import annotations\n",
        *([f"from collections.abc import {', '.join(types)}"] if types else []),
        *([f"from typing import {', '.join(typed)}"] if typed else []),
        "",
        "from volant.model import (",
        *(f"    {name}," for name in [*used, "check_name"]),
        ")\n",
        f"from ._calls import {', '.join(helpers)}" if helpers else "",
        "from ._transport import Operations, Request, decode",
    ]
    return "\n".join(lines) + "\n\n\n" + text + "\n"


def _class(resource: str, operations: Iterable[Operation]) -> str:
    head = f"class {resource.title()}Operations(Operations):\n"
    changes = [each for each in operations if each.waits_for is not None and each.body is Nothing]
    if changes:
        states = {str(each.client).partition(".")[2]: str(each.waits_for) for each in changes}
        head += f"    waits_for: ClassVar[Mapping[str, str]] = {states}\n\n"
    return head + "\n\n".join(textwrap.indent(_method(each), "    ") for each in operations)


def _method(operation: Operation) -> str:
    assert operation.client is not None
    name = operation.client.partition(".")[2]
    arguments = [f"{argument}: str" for argument in operation.arguments]
    keywords: list[str] = []
    sent: list[str] = []
    body = _body(operation)
    if body is not None:
        argument, expression = body
        arguments.append(argument)
        sent.append(f"body={expression}")
    query: list[str] = []
    for key, parameter in operation.query.items():
        keywords.append(f"{key}: {parameter.client_type} = {_client_default(parameter)}")
        value = f"{parameter.encoder}({key})" if parameter.encoder else key
        query.append(f'"{parameter.name or key}": {value}')
    if query:
        sent.insert(0, f"query={{{', '.join(query)}}}")
    if operation.registry_auth:
        keywords.append("registry_auth: str | None = None")
        sent.append("headers=registry_headers(registry_auth)")
    waits = [] if operation.client_timeout_s is None else ["timeout_s=timeout_s"]
    if operation.idempotent:
        keywords.append("idempotency_key: str | None = None")
    if operation.client_timeout_s is not None:
        keywords.append(f"timeout_s: float = {operation.client_timeout_s}")
    signature = ", ".join(["self", *arguments, *(["*", *keywords] if keywords else [])])
    answer = operation.answers[operation.status].type
    returns = "None" if answer is None else _type(answer)
    decoded = returns.replace("Sequence[", "list[")
    path = _path(operation)
    if operation.idempotent:
        call = f"self._transport.once({', '.join([path, 'key=idempotency_key', *sent, *waits])})"
    else:
        request = f"Request({', '.join([repr(operation.method), path, *sent])})"
        call = f"self._transport.send({', '.join([request, *waits])})"
    if answer is None:
        result = f"await {call}"
    elif operation.method == "GET" and not waits:
        result = f"return await self._transport.get({', '.join([path, decoded, *sent])})"
    else:
        result = f"return decode(await {call}, {decoded})"
    lines = [f"async def {name}({signature}) -> {returns}:", *_docstring(operation), f"    {result}"]
    return "\n".join(lines)


def _docstring(operation: Operation) -> list[str]:
    text = inspect.cleandoc(operation.call.__doc__ or "") if operation.call is not None else ""
    body = textwrap.fill(text.partition("\n\n")[0].replace("\n", " "), 108, break_on_hyphens=False)
    rest = text.partition("\n\n")[2]
    notes = [f":param {key}: {_lower(parameter.help)}" for key, parameter in operation.query.items()]
    if operation.registry_auth:
        notes.append(":param registry_auth: credentials for registries: the base64 of an auth file")
    if operation.client_timeout_s is not None:
        notes.append(":param timeout_s: how long to wait for the answer")
    parts = [body, *([textwrap.fill(rest.replace("\n", " "), 108, break_on_hyphens=False)] if rest else [])]
    if notes:
        parts.append(
            "\n".join(textwrap.fill(note, 108, break_on_hyphens=False, subsequent_indent="    ") for note in notes)
        )
    whole = "\n\n".join(parts)
    ending = '"""' if "\n" not in whole else '\n"""'
    return textwrap.indent(f'"""{whole}{ending}', "    ").split("\n")


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def _path(operation: Operation) -> str:
    """Returns an expression for the path that escapes its arguments, so that they can't lead to another path."""

    def part(found: re.Match[str]) -> str:
        name = found[1]
        plain = name in ("name", "snapshot")
        return f"{{{'check_name' if plain else 'part'}({name}, '{name}')}}"

    path = re.sub(r"{(\w+)}", part, operation.path)
    return f'f"{path}"' if path != operation.path else f'"{path}"'


def _body(operation: Operation) -> tuple[str, str] | None:
    """Returns the argument for the body, and the expression that is sent."""
    body = operation.body
    if body in (None, Nothing):
        return None
    if isinstance(body, OneOf):
        return f"request: {' | '.join(each.__name__ for each in body.types)} | Mapping[str, Any]", "body_of(request)"
    if (field := _only_member(body)) is not None:
        if field.required:
            return f"{field.name}: {_type(field.type)}", f'{{"{field.name}": {field.name}}}'
        return f"{field.name}: {_type(field.type)} = None", f"body_of({body.__name__}({field.name}))"
    if any(field.required for field in msgspec.structs.fields(body)):
        return f"request: {body.__name__} | Mapping[str, Any]", "body_of(request)"
    return f"request: {body.__name__} | Mapping[str, Any] | None = None", f"body_of(request or {body.__name__}())"


def _only_member(body: type[msgspec.Struct]) -> FieldInfo | None:
    """Returns the only member of a body, which clients pass by itself; None if they pass the whole body.

    A body of one of several types is passed whole, and can be a mapping.
    """
    fields = msgspec.structs.fields(body)
    if len(fields) != 1:
        return None
    kinds = [each for each in get_args(fields[0].type) if each is not type(None)]
    return None if get_origin(fields[0].type) in (Union, UnionType) and len(kinds) > 1 else fields[0]


def _client_default(parameter: QueryParameter) -> str:
    return {"bool": "False", "Collection[str]": "()"}.get(parameter.client_type, "None")


def _type(of: Any) -> str:
    if of == JsonObject:
        return "dict[str, Any]"
    origin = get_origin(of)
    if origin is list:
        return f"Sequence[{_type(get_args(of)[0])}]"
    if origin is not None and type(None) in get_args(of):
        return " | ".join([*(_type(each) for each in get_args(of) if each is not type(None)), "None"])
    if origin is not None and hasattr(of, "__metadata__"):
        return _type(get_args(of)[0])
    return str(of.__name__)


def _model_names(operation: Operation) -> Iterable[str]:
    answer = operation.answers[operation.status].type
    if get_origin(answer) is list:
        (answer,) = get_args(answer)
    body = operation.body
    types = body.types if isinstance(body, OneOf) else (body,)
    for each in (answer, *types):
        if isinstance(each, type) and issubclass(each, msgspec.Struct) and each is not Nothing:
            member = _only_member(each)
            if each is answer or member is None or not member.required:
                yield each.__name__
