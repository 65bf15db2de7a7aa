"""JSON Schemas of structs, with the docstrings of their members."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints, is_typeddict

import msgspec

from volant.model.docstrings import member_texts

Schema = dict[str, Any]


def standalone(kind: type[msgspec.Struct]) -> Schema:
    """Returns the schema of one struct, with references replaced by their targets: not all readers follow
    references."""
    _, components = msgspec.json.schema_components([kind], ref_template="{name}")
    for owner in owners(kind):
        for base in reversed(owner.__mro__):
            if owner is base or (issubclass(base, msgspec.Struct) and base is not msgspec.Struct):
                describe(base, components[owner.__name__])
    plain = msgspec.json.decode(msgspec.json.encode(components))

    def resolved(schema: Any) -> Any:
        if isinstance(schema, dict):
            if isinstance(name := schema.get("$ref"), str):
                return {**resolved(plain[name]), **{key: value for key, value in schema.items() if key != "$ref"}}
            return {key: resolved(value) for key, value in schema.items()}
        return [resolved(item) for item in schema] if isinstance(schema, list) else schema

    whole: Schema = resolved(plain[kind.__name__])
    return whole


def owners(kind: Any) -> Iterator[type]:
    """Yields the structs and typed dictionaries that a type consists of."""
    if isinstance(kind, type) and (issubclass(kind, msgspec.Struct) or is_typeddict(kind)):
        yield kind
        for hint in get_type_hints(kind).values():
            yield from owners(hint)
    for argument in get_args(kind):
        yield from owners(argument)


def describe(owner: type, schema: Schema) -> None:
    """Adds the docstrings of a class and its members, and the rules that its types can't express, to its schema."""
    texts = member_texts(owner)
    if texts is None:
        return
    wire = dict(
        zip(*(getattr(owner, name, ()) for name in ("__struct_fields__", "__struct_encode_fields__")), strict=True)
    )
    for name, text in texts.items():
        described = schema["properties"].get(wire.get(name, name))
        if described is not None:
            described["description"] = text
    if "description" in schema:
        schema["description"] = " ".join(schema["description"].split())
    schema.update(getattr(owner, "SCHEMA", {}))
