"""The list of passes as text: name, promise, what it does, options with their defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from splitfx.compiler.protocol import Pass
from splitfx.ground.table import wrap
from splitfx.report.explanation import PROMISES


def passes_text(known: Mapping[str, type[Pass]]) -> str:
    """One paragraph per pass."""
    return "\n\n".join("\n".join(_one(name, cls)) for name, cls in known.items())


def _one(name: str, cls: type[Pass]) -> list[str]:
    schema = cls.schema()
    options = {key: one for key, one in schema["properties"].items() if key != "name"}
    lines = [
        name,
        wrap(f"  {schema['description']}", "  "),
        wrap(f"  promise {cls.promise.value}: {PROMISES[cls.promise.value]}", "  "),
    ]
    if cls.needs_eval:
        lines.append("  needs the model in eval mode")
    width = max(map(len, options), default=0)
    for key, one in options.items():
        needed = "needed" if key in schema["required"] else f"default {json.dumps(one.get('default'))}"
        lines.append(wrap(f"    {key.ljust(width)}  {_kind(one)}; {needed}", " " * (width + 6)))
    return lines if options else [*lines, "    no options"]


_WORDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "boolean": "true or false",
    "object": "a table",
}


def _kind(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if schema.get("type") == "array":
        many = {"integer": "whole numbers", "string": "texts", "number": "numbers"}
        if "enum" in schema.get("items", {}):
            return f"a list of {' | '.join(map(str, schema['items']['enum']))}"
        if keys := schema.get("items", {}).get("properties"):
            return f"a list of tables of {', '.join(keys)}"
        return f"a list of {many.get(schema.get('items', {}).get('type', ''), 'values')}"
    if "anyOf" in schema:
        return " or ".join(map(_kind, schema["anyOf"]))
    return _WORDS.get(schema.get("type", ""), "a value")
