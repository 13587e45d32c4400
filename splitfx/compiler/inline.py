"""A pass or a shape written as one word: ``group factors=8,2,2,4,4 fusion=keep`` and ``1x3x224x224``.

Values are read by the type that the option declares; anything else is a `PlanError` in the words of the pass.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Sequence
from typing import Any

from splitfx.compiler import registry
from splitfx.compiler.protocol import Pass
from splitfx.errors import PlanError, UnsupportedError, nearest
from splitfx.ground import limits
from splitfx.text import shown

DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "uint8", "bool")


def parse_pass(text: str) -> Pass:
    """The pass that ``text`` names, with its options. Raises `PlanError`."""
    if len(text) > limits.WORD:
        raise PlanError(f"--pass {shown(text)} has more than {limits.WORD} characters; write a plan file instead")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise PlanError(f"--pass {shown(text)} cannot be read: {error}") from None
    if not words:
        raise PlanError("--pass is empty; write a name and options, such as 'group factors=2,2,4'")
    if "," in words[0]:
        raise PlanError(f"--pass {shown(text)}: write one --pass for each, in order")
    cls = registry.get(words[0])
    known = cls.schema()["properties"]
    texts: dict[str, str] = {}
    for word in words[1:]:
        option, equals, value = word.partition("=")
        if equals:
            texts[option] = value
        elif texts:  # a value of two words, such as 64 MiB
            texts[next(reversed(texts))] += f" {word}"
        else:
            raise PlanError(f"--pass {shown(text)}: '{word}' is no option=value")
    return cls.from_dict({option: _value(value, known.get(option, {})) for option, value in texts.items()})


def parse_sizes(text: str) -> tuple[tuple[int, ...], str]:
    """``1x3x224x224`` or ``1x16:int64`` as sizes and the name of a dtype. Raises `UnsupportedError`."""
    sizes, _, dtype = text.partition(":")
    if "," in sizes and re.search("[x×]", sizes):
        raise UnsupportedError(f"--input {shown(text)}: give each input by an --input of its own")
    sizes = sizes.strip().removeprefix("(").removesuffix(")").replace(", ", ",")
    if not re.fullmatch(r"\d+([x×,]\d+)+", sizes.strip()):
        raise UnsupportedError(f"--input {shown(text)}: sizes are written batch first, such as 1x3x224x224")
    try:
        found = tuple(map(int, re.split("[x×,]", sizes.strip())))
    except ValueError:  # Python reads no integer of thousands of digits
        raise UnsupportedError(f"--input {shown(text)}: a size has too many digits") from None
    if min(found) < 1:
        raise UnsupportedError(f"--input {shown(text)}: every size is 1 or more")
    limits.check_shape(found, UnsupportedError, "--input")
    if dtype and dtype not in DTYPES:
        raise UnsupportedError(
            f"--input {shown(text)}: there is no type '{dtype}'.{nearest(dtype, DTYPES)} Types: {', '.join(DTYPES)}"
        )
    return found, dtype or "float32"


def parse_inputs(texts: Sequence[str]) -> tuple[list[str], list[tuple[tuple[int, ...], str]]]:
    """Each ``--input`` as `parse_sizes` reads it, and the names of forward's parameters where they are given, as in
    ``mask=1x1x32x32``; all of them have one or none has. Raises `UnsupportedError`."""
    named = [text.partition("=") for text in texts]
    if not any(equals for _, equals, _ in named):
        return [], [parse_sizes(text) for text in texts]
    if not all(equals and name.isidentifier() for name, equals, _ in named):
        raise UnsupportedError("--input: give every input by its name, such as mask=1x1x32x32, or none")
    names = [name for name, _, _ in named]
    if len(set(names)) < len(names):
        raise UnsupportedError(f"--input: {', '.join(names)}: each name once")
    return names, [parse_sizes(sizes) for _, _, sizes in named]


def _value(text: str, schema: dict[str, Any]) -> Any:
    if "anyOf" in schema:  # one value or a list of them
        lists = [one for one in schema["anyOf"] if one.get("type") == "array"]
        single = [one for one in schema["anyOf"] if one.get("type") != "array"]
        listed = bool(lists) and ("," in text or text.startswith("["))
        return _value(text, (lists if listed or not single else single)[0])
    if schema.get("type") == "array" and schema.get("items", {}).get("type") != "object":
        inner = text.strip().removeprefix("[").removesuffix("]")
        return [_value(one, schema.get("items", {})) for one in inner.split(",") if one]
    if schema.get("type") == "string" or "enum" in schema:
        return text
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text
