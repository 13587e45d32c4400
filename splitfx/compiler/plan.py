"""The plan: which passes run, in which order, with which options; and its TOML text.

Does: reads and writes TOML with a format number, checks every name and value while reading.
Refuses (`PlanError`, one line, with the path when there is one): an empty plan, unknown passes, options
or keys with the nearest known name, values of another type, a newer format, files that are missing, empty, cut off
inside a line, not UTF-8 or beyond `splitfx.ground.limits`; writing over an existing file unless told so.
Promises: `Plan.from_toml(plan.to_toml()) == plan`. Options that hold data (`not_in_plan`) are not part of the
text: a plan read back has None there.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from splitfx.compiler import options, registry
from splitfx.compiler.protocol import Pass
from splitfx.errors import PlanError, nearest
from splitfx.ground import limits
from splitfx.ground.files import read_text, written_whole
from splitfx.text import cut, shown

FORMAT = 1
BOM = "\ufeff"  # byte order mark, which editors put in front

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """An ordered, frozen list of passes; equal and hashable by its contents.

    `input_shape` is the shape of the one input, batch first, such as (1, 3, 224, 224), or a tuple of
    such shapes for a model of several inputs. Lists are accepted and become tuples. Raises `PlanError`.
    """

    passes: tuple[Pass, ...]
    input_shape: Shape | tuple[Shape, ...] | None = None

    def __init__(
        self, passes: Sequence[Pass], input_shape: Sequence[int] | Sequence[Sequence[int]] | None = None
    ) -> None:
        object.__setattr__(self, "passes", _checked_passes(passes))
        object.__setattr__(self, "input_shape", _checked_shape(input_shape))

    @classmethod
    def of(cls, given: Any) -> Plan:
        """The plan that ``given`` is or stands for: a plan, a pass, a list of passes, a dict (of a plan file, or of one
        of its ``[[pass]]`` tables; also inside a list), or the path of a plan file. Raises `PlanError`."""
        if isinstance(given, Plan):
            return given
        if isinstance(given, Pass):
            return cls([given])
        if isinstance(given, str | os.PathLike):
            return cls.load(given)
        if isinstance(given, Mapping):
            return cls._of_table(dict(given))
        if isinstance(given, list | tuple):
            read = [_read_pass(i, dict(p)) if isinstance(p, Mapping) else p for i, p in enumerate(given, 1)]
            return cls(read)
        if isinstance(given, type) and issubclass(given, Pass):
            raise PlanError(f"{given.__name__} is the class of a pass: give {given.__name__}(...)")
        raise PlanError(
            f"a plan is a splitfx.Plan, a pass, a list of passes, a dict or the path of a file; got {shown(given)}."
        )

    @classmethod
    def _of_table(cls, given: dict[str, Any]) -> Self:
        if "name" in given and "pass" not in given:
            return cls([_read_pass(1, given)])
        _check_format({"format": FORMAT, **given})
        _check_keys(given)
        return cls(_read_passes(given.get("pass", [])), given.get("input_shape"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a plan file. Raises `PlanError` with the path for anything wrong with the file or the plan."""
        try:
            text = read_text(Path(path), most=limits.PLAN_BYTES)
        except FileNotFoundError:
            known = registry.all().get(str(path))
            hint = f" The pass of that name is {known.__name__}(...)." if known else ""
            raise PlanError(f"{path}: there is no such plan file.{hint}") from None
        except OSError as error:
            raise PlanError(f"{path}: cannot be read: {error.strerror or error}.") from error
        except ValueError as error:
            raise PlanError(f"{path}: is not a plan: {error}.") from None
        try:
            return cls.from_toml(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the plan file, whole or not at all. Raises `PlanError` when it exists or is not writable."""
        with written_whole(path, overwrite=overwrite, error=PlanError) as draft:
            draft.write_text(self.to_toml(), encoding="utf-8", newline="\n")

    @classmethod
    def from_toml(cls, text: str) -> Self:
        """Read a plan from its text. Raises `PlanError` for text that is no TOML or no plan."""
        text = text.removeprefix(BOM)
        if not text.strip():
            raise PlanError("the plan is empty.")
        if len(text) > limits.PLAN_BYTES:
            raise PlanError(f"the plan has {len(text)} characters; a plan has at most {limits.PLAN_BYTES}.")
        limits.check_nesting(text, PlanError, "the plan")
        try:
            given = tomllib.loads(text)
        except ValueError as error:  # a number of too many digits is one too
            raise PlanError(f"the plan is not valid TOML, or was cut off: {error}.") from None
        _check_format(given)
        return cls._of_table(given)

    def to_toml(self) -> str:
        """The plan's text: only options that differ from their defaults."""
        lines = [f"format = {FORMAT}"]
        if self.input_shape is not None:
            lines.append(f"input_shape = {_value(self.input_shape)}")
        for one in self.passes:
            lines += ["", "[[pass]]", f"name = {_value(one.name)}", *_option_lines(one.to_dict())]
        return "\n".join(lines) + "\n"


def plan_schema() -> dict[str, Any]:
    """The JSON schema of a plan file, built from the options of every known pass."""
    shape = {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": 2}
    shapes = {"type": "array", "items": shape, "minItems": 1}
    passes = [cls.schema() for cls in registry.all().values()]
    properties = {
        "format": {"const": FORMAT},
        "input_shape": {"anyOf": [shape, shapes]},
        "pass": {"type": "array", "minItems": 1, "items": {"oneOf": passes}},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "splitfx plan",
        "type": "object",
        "properties": properties,
        "required": ["format", "pass"],
        "additionalProperties": False,
    }


def _checked_passes(given: Any) -> tuple[Pass, ...]:
    if isinstance(given, Pass) or not isinstance(given, Sequence) or isinstance(given, str):
        raise PlanError(f"a plan takes a list of passes, such as Plan([...]); got {shown(given)}.")
    if not given:
        raise PlanError("a plan needs at least one pass.")
    if len(given) > limits.PASSES:
        raise PlanError(f"the plan has {len(given)} passes; a plan has at most {limits.PASSES}.")
    for position, one in enumerate(given, 1):
        if isinstance(one, type) and issubclass(one, Pass):
            raise PlanError(f"pass {position} of the plan is a class; write {one.__name__}() with its options.")
        if not isinstance(one, Pass):
            raise PlanError(f"pass {position} of the plan is not a pass: {shown(one)}.")
    return tuple(given)


def _checked_shape(given: Any) -> Any:
    if given is None:
        return None
    try:
        shape = options.convert(given, tuple[int, ...] | tuple[tuple[int, ...], ...])
    except options.Mismatch:
        shape = ()
    shapes = shape if shape and isinstance(shape[0], tuple) else (shape,)
    if all(len(one) >= 2 and min(one) >= 1 for one in shapes):
        for one in shapes:
            limits.check_shape(one, PlanError, "input_shape")
        return shape
    allowed = "a list of at least 2 positive integers, batch first, such as [1, 3, 224, 224]"
    raise PlanError(f"input_shape must be {allowed}, or a list of such lists; got {shown(given)}.")


def _check_format(given: dict[str, Any]) -> None:
    number = given.get("format")
    if number is None:
        raise PlanError(f"the plan has no format number; is it a plan? Its first line must be 'format = {FORMAT}'.")
    if type(number) is not int or number < 1:
        raise PlanError(f"the plan's format must be a positive integer; got {shown(number)}.")
    if number > FORMAT:
        newer = f"the plan has format {shown(number)}, this splitfx reads formats up to {FORMAT}"
        raise PlanError(f"{newer}; upgrade splitfx, or save the plan with this version.")


def _check_keys(given: dict[str, Any]) -> None:
    known = ("format", "input_shape", "pass")
    for key in given:
        if key not in known:
            raise PlanError(f"a plan has no key '{cut(key)}'.{nearest(key, known)} Its keys: {', '.join(known)}.")


def _read_passes(tables: Any) -> list[Pass]:
    if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
        raise PlanError("passes are written as [[pass]] tables, with double brackets.")
    return [_read_pass(position, table) for position, table in enumerate(tables, 1)]


def _read_pass(position: int, table: dict[str, Any]) -> Pass:
    name = table.get("name")
    if not isinstance(name, str):
        raise PlanError(f"pass {position} of the plan has no name; add a line such as name = 'group'.")
    try:
        return registry.get(name).from_dict({key: value for key, value in table.items() if key != "name"})
    except PlanError as error:
        raise PlanError(f"pass {position} of the plan: {error}") from None


def _option_lines(values: dict[str, Any]) -> list[str]:
    # A table of many layers reads better as lines of its own, and TOML wants tables after the plain keys.
    tables = {key: one for key, one in values.items() if isinstance(one, dict) or _is_tables(one)}
    lines = [f"{key} = {_value(one)}" for key, one in values.items() if key not in tables]
    for key, found in tables.items():
        head = f"[pass.{key}]" if isinstance(found, dict) else f"[[pass.{key}]]"
        for table in [found] if isinstance(found, dict) else found:
            lines += [head, *(f"{_key(name)} = {_value(one)}" for name, one in table.items())]
    return lines


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _value(name)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON escapes all that TOML does, save DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(one) for one in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(name)} = {_value(one)}" for name, one in value.items()) + "}"
    return repr(value)
