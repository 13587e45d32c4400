"""The list of passes as text: name, promise, what it does, options with their defaults; of one pass, all that its
docstring says of every option."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
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


def pass_text(name: str, cls: type[Pass]) -> str:
    """One pass with what its docstring says: of the pass, and of every option below it."""
    told, schema = option_texts(cls), cls.schema()
    about = inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[2]
    rest = [one for one in about.split("\n\n") if not _HEAD.match(one.lstrip())]
    lines = [name, wrap(f"  {schema['description']}", "  ")]
    lines.append(wrap(f"  promise {cls.promise.value}: {PROMISES[cls.promise.value]}", "  "))
    lines += ["  needs the model in eval mode"] if cls.needs_eval else []
    for key, one in schema["properties"].items():
        if key == "name":
            continue
        needed = "needed" if key in schema["required"] else f"default {json.dumps(one.get('default'))}"
        lines += ["", wrap(f"  {key}: {_kind(one)}; {needed}", "      ")]
        lines += [wrap(f"      {told[key]}", "      ")] if key in told else []
    for key in _in_python(cls):
        lines += ["", wrap(f"  {key}: given in Python, a plan does not hold it", "      ")]
        lines += [wrap(f"      {told[key]}", "      ")] if key in told else []
    for paragraph in rest:
        lines += ["", wrap("  " + _plain(paragraph), "  ")]
    return "\n".join(lines)


def option_texts(cls: type[Pass]) -> dict[str, str]:
    """What a pass's docstring says of its options, by name: the text behind ``option``: up to the next one."""
    found: dict[str, str] = {}
    known = {*cls.schema()["properties"], *_in_python(cls)}
    for paragraph in inspect.cleandoc(cls.__doc__ or "").split("\n\n"):
        text = " ".join(paragraph.split())
        heads = [m for m in _HEAD.finditer(text) if known.issuperset(_NAME.findall(m[0]))]
        ends = [*(m.start() for m in heads[1:]), len(text)][: len(heads)]
        for head, end in zip(heads, ends, strict=True):
            for name in _NAME.findall(head[0]):
                found.setdefault(name, _plain(text[head.end() : end].partition(" Raises `")[0]))
    return found


def _in_python(cls: type[Pass]) -> list[str]:
    """Options that are no plain data, such as ``calibration``."""
    return [one.name for one in dataclasses.fields(cls) if not one.metadata.get("plan", True)]


_NAME = re.compile(r"``(\w+)``")
_HEAD = re.compile(r"(?:``\w+``(?:, | and )?)+(?: \w+)?:")


def _plain(text: str) -> str:
    """Prose without the marks of a docstring, as a sentence."""
    plain = " ".join(text.split()).replace("``", "").replace("`", "").strip()
    return plain[:1].upper() + plain[1:]


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
