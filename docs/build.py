"""Builds what the code says of itself: `docs/reference/volar.md` from the commands, `docs/api/openapi.yaml` and the
table in `docs/reference/rest.md` from the routes, the reference of manifests and their JSON Schema from the structs,
and the reference of the Python API in `docs/site`, which is not kept.

With `demo` it first runs `examples/demo.py` and records it as `docs/demo.cast`, of which `docs/demo.svg` is made. With
`--check` nothing is written: the exit code says whether the kept files are what the code says.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pdoc
import pdoc.render
import recording
import yaml

from volant.api._openapi import document
from volant.cli._volar import volar
from volant.mcp._tool import Tool
from volant.mcp._tools import tools
from volant.operations import TABLE, standalone
from volant.operations._client import client_module

DOCS = Path(__file__).resolve().parent
MODULES = ["actors", "actors.testing", "volant.client", "volant.model", "volant.images"]


def main() -> int:
    """Write or check; return the exit code."""
    if "demo" in sys.argv[1:]:
        _CAST.write_text(recording.record())
    kept = {path: write() for path, write in KEPT.items()}
    if "--check" in sys.argv[1:]:
        stale = [path for path, text in kept.items() if not path.is_file() or path.read_text() != text]
        for path in stale:
            print(f"{path} is not what the code says: run `make docs`", file=sys.stderr)
        return 1 if stale else 0
    for path, text in kept.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for module in map(importlib.import_module, MODULES):
        if not hasattr(module, "__all__"):
            # The face of a package says what it exports by `A as A`, of which nothing is left here.
            found = (name for name, value in vars(module).items() if not isinstance(value, ModuleType))
            vars(module)["__all__"] = [name for name in found if not name.startswith("_")]
    pdoc.render.configure(docformat="restructuredtext")
    pdoc.pdoc(*MODULES, output_directory=DOCS / "site")
    return 0


def openapi() -> str:
    """The OpenAPI document."""
    text = yaml.safe_dump(document(), sort_keys=False, width=110, allow_unicode=True)
    return f"# Written by docs/build.py from volant/operations.\n{text}"


def reference() -> str:
    """The page of all commands."""
    parts = ["# volar", "<!-- Written by docs/build.py. -->"]
    parts.extend(_pages(volar, click.Context(volar, info_name="volar")))
    return "\n\n".join(parts) + "\n"


def _pages(command: click.Command, context: click.Context) -> Iterator[str]:
    if context.parent is not None:
        yield f"{'#' * (context.command_path.count(' ') + 1)} {context.command_path}"
    yield _prose(command.help or "")
    if not isinstance(command, click.Group):
        yield "```text\n" + context.command_path + " " + " ".join(command.collect_usage_pieces(context)) + "\n```"
    options = [record for item in command.get_params(context) if (record := item.get_help_record(context))]
    everywhere = _EVERYWHERE if context.parent is not None else {"--help"}
    options = [(names, text) for names, text in options if text and names.split()[0] not in everywhere]
    if options:
        rows = "\n".join(f"| `{_cell(names)}` | {_cell(text)} |" for names, text in options)
        yield f"| option | |\n| --- | --- |\n{rows}"
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None:
                yield from _pages(child, click.Context(child, parent=context, info_name=name))


# Every command has these; they stand with `volar` itself.
_EVERYWHERE = {
    *("--api", "--remote", "--api-key-file", "--ca-file", "--client-cert", "--client-key"),
    *("--json", "--debug", "--help"),
}


def _prose(text: str) -> str:
    paragraphs = re.split(r"\n\s*\n", text.replace("\b\n", "").strip())
    return "\n\n".join(" ".join(line.strip() for line in paragraph.splitlines()) for paragraph in paragraphs)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


_MANIFEST = """\
# Plugin manifests

<!-- Written by docs/build.py. -->

What `POST /api/v1/plugins` and `volar plugins install` take, in JSON (`volar` also reads TOML). [How to write a
plugin](../how-to/write-a-plugin.md) goes through it step by step. [manifest.schema.json](manifest.schema.json) is the
same as JSON Schema (2020-12), for editors and checkers.

A member that is not named here is refused, and so is a manifest of more than 256 KiB. The answer names the member at
fault: `actions.shot.path`.
"""


def manifest_schema() -> str:
    """The JSON Schema of manifests."""
    text = json.dumps({"$ref": _SCHEMAS + "Manifest", "$defs": _of_manifests()})
    schema = json.loads(text.replace(_SCHEMAS, "#/$defs/"))
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Volant plugin manifest"}
    return json.dumps(head | schema, indent=2, ensure_ascii=False) + "\n"


def manifest_reference() -> str:
    """The page of manifests."""
    parts = [_MANIFEST.rstrip("\n")]
    for name, schema in _of_manifests().items():
        parts.append(f"## {name}" if name != "Manifest" else "## The manifest")
        parts.append(schema.get("description", ""))
        rows = [
            f"| `{member}` | {_cell(_kind(of))} | {_default(of, member in schema['required'])} "
            f"| {_cell(of.get('description', ''))} |"
            for member, of in schema["properties"].items()
        ]
        parts.append("\n".join(["| member | | default | |", "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(part for part in parts if part) + "\n"


_SCHEMAS = "#/components/schemas/"


def _of_manifests() -> dict[str, Any]:
    """The schemas that a manifest is made of, it first, each after one that names it."""
    schemas = document()["components"]["schemas"]
    names = ["Manifest"]
    for name in names:
        found = re.findall(f'"{_SCHEMAS}([^"]+)"', json.dumps(schemas[name]))
        names.extend(one for one in dict.fromkeys(found) if one not in names)
    return {name: schemas[name] for name in names}


def _kind(schema: dict[str, Any]) -> str:
    """What a member may be, in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix(_SCHEMAS)
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    match schema.get("type"):
        case "array":
            return f"list of {_kind(schema['items'])}"
        case "object":
            of = schema.get("additionalProperties")
            most = f"at most {schema['maxProperties']}: " if "maxProperties" in schema else ""
            return f"object of {most}{_kind(of)}" if isinstance(of, dict) and of else "object"
        case "string":
            pattern, longest = schema.get("pattern", ""), schema.get("maxLength")
            # What only keeps control characters out is not worth a look.
            return (f"text `{pattern}`" if pattern and "\\x" not in pattern else "text") + (
                f", at most {longest} characters" if longest else ""
            )
        case "integer" | "number":
            low, above, high = (schema.get(key) for key in ("minimum", "exclusiveMinimum", "maximum"))
            least = f" more than {above}" if above is not None else "" if low is None else f" from {low}"
            return f"{schema['type']}" + least + ("" if high is None else f" to {high}")
        case kind:
            return str(kind or "any")


def _default(schema: dict[str, Any], required: bool) -> str:
    if required:
        return "required"
    value = schema.get("default")
    return "" if value in (None, {}, [], "") or "$ref" in schema else f"`{json.dumps(value)}`"


_MCP = """\
# MCP tools

<!-- Written by docs/build.py. -->

What models can do over `POST /api/v1/mcp`, in the order in which they see it; [how to let a model use
VMs](../how-to/mcp.md) explains the rest. Descriptions and schemas here are those that the model reads. A failure is a
result with `isError`, whose text says what is wrong and what to do. Texts have at most 64 KiB: of more the head and the
tail, with a marker between them.
"""


def mcp_reference() -> str:
    """The page of tools for models."""
    parts = [_MCP.rstrip("\n")]
    for tool in tools(TABLE):
        parts.append(f"## {tool.name}")
        parts.append(f"{tool.description} {_behaviour(tool)}")
        for title, kind in (("takes", tool.takes), ("gives", tool.gives)):
            schema = standalone(kind)
            rows = [
                f"| `{member}` | {_cell(_kind(of))} | {_default(of, member in schema.get('required', ()))} "
                f"| {_cell(of.get('description', ''))} |"
                for member, of in schema["properties"].items()
            ]
            head = f"| it {title} | | {'default' if title == 'takes' else ''} | |"
            parts.append("\n".join([head, "| --- | --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def _behaviour(tool: Tool) -> str:
    if tool.read_only:
        return "*Changes nothing.*"
    words = ["destructive" if tool.destructive else "destroys nothing"]
    words.append("doing it twice is doing it once" if tool.idempotent else "each call counts")
    return f"*Changes something: {', '.join(words)}.*"


_REST = DOCS / "reference" / "rest.md"
_ROUTES = re.compile(r"(?<=<!-- Routes, written by docs/build.py. -->\n)(.*)(?=<!-- Here they end. -->)", re.DOTALL)


def rest_reference() -> str:
    """The page of the API: what people wrote, with the table of all routes in it."""
    rows: dict[tuple[str, str], list[str]] = {}
    for path, operations in document()["paths"].items():
        for method, operation in operations.items():
            how = "WebSocket" if "101" in operation["responses"] else method.upper()
            rows.setdefault((path, operation["summary"]), []).append(how)
    table = [f"| `{' '.join(how)}` | `{path}` | {_cell(says)} |" for (path, says), how in rows.items()]
    return _ROUTES.sub("\n".join(["", "| method | path | |", "| --- | --- | --- |", *table, "", ""]), _REST.read_text())


_CAST = DOCS / "demo.cast"


def demo_svg() -> str:
    """The recorded session of the README."""
    return recording.render(_CAST.read_text())


def client() -> str:
    """The methods of the client."""
    ruff = [sys.executable, "-m", "ruff"]
    text = client_module(TABLE)
    for command in (["check", "--select", "F401,I", "--fix", "-q"], ["format", "-q"]):
        done = subprocess.run(
            [*ruff, *command, "--stdin-filename", str(CLIENT), "-"],
            input=text, stdout=subprocess.PIPE, text=True, check=True, cwd=DOCS.parent,
        )  # fmt: skip
        text = done.stdout
    return text


CLIENT = DOCS.parent / "volant" / "client" / "_operations.py"

KEPT = {
    DOCS / "demo.svg": demo_svg,
    CLIENT: client,
    _REST: rest_reference,
    DOCS / "reference" / "volar.md": reference,
    DOCS / "reference" / "manifest.md": manifest_reference,
    DOCS / "reference" / "manifest.schema.json": manifest_schema,
    DOCS / "reference" / "mcp.md": mcp_reference,
    DOCS / "api" / "openapi.yaml": openapi,
}
"""What is kept, and what writes it."""


if __name__ == "__main__":
    sys.exit(main())
