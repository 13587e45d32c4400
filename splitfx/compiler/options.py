"""The plain types that an option of a pass may have: checked, described and turned into a JSON schema.

Does: reads a dataclass's type hints (`bool`, `int`, `float`, `str`, `Literal`, `tuple`, `dict` with text
keys, frozen dataclasses of those, unions, `None` as one member of a union) and checks values against them.
Refuses: any other hint (`PassError`, for the pass's author) and any value outside its hint (`Mismatch`).
Promises: a value that passes is immutable and hashable, and equal after a trip through TOML, in which a dataclass is a
table of the fields that differ from their defaults.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from splitfx.errors import PassError, PlanError, nearest
from splitfx.ground import limits
from splitfx.text import cut, shown

INT64 = 2**63  # TOML promises 64-bit integers and no more


class Mismatch(Exception):
    """A value is not of the type that its option declares. Callers turn it into a `PlanError` with names.

    ``allowed``: what the value must be, where its hint does not say. ``problem``: what is wrong at ``path`` inside the
    value, such as "[1].rows"; both are empty where it is the value itself.
    """

    def __init__(self, allowed: str = "", path: str = "", problem: str = "") -> None:
        super().__init__(allowed, path, problem)
        self.allowed, self.path, self.problem = allowed, path, problem

    def says(self, value: Any, hint: Any) -> str:
        """What is wrong with ``value``, which is not ``hint``: the sentence behind its name."""
        return self.problem or f"must be {self.allowed or describe(hint)}; got {shown(value)}"


class FrozenDict(dict):
    """A dict that cannot change, so that a pass holding one stays hashable."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type, tuple[dict]]:  # copy and pickle refill through __setitem__ otherwise
        return FrozenDict, (dict(self),)

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("an option of a pass cannot be changed; make a new pass with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = pop = popitem = clear = _refuse
    update: Any = _refuse
    setdefault: Any = _refuse


# ---------------------------------------------------------------- the fields of a dataclass


@functools.cache
def fields(cls: type) -> dict[str, Any]:
    """The fields of a dataclass that are part of a plan, with their type hints."""
    hints = get_type_hints(cls)
    return {one.name: hints[one.name] for one in dataclasses.fields(cls) if one.metadata.get("plan", True)}


def default(cls: type, name: str) -> Any:
    """What a field is where nothing is given; `MISSING` where something has to be."""
    field = {one.name: one for one in dataclasses.fields(cls)}[name]
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return value if value is MISSING else convert(value, fields(cls)[name])


def normalise(instance: Any, named: str) -> None:
    """Check every field of a frozen dataclass and normalise it ([8, 2] -> (8, 2)); called by its `__post_init__`.

    ``named``: how a message names a field, such as "recipe: {}". Raises `PlanError`.
    """
    for name, hint in fields(type(instance)).items():
        value = getattr(instance, name)
        try:  # the dataclass is frozen for its users; this is the one place that normalises
            object.__setattr__(instance, name, convert(value, hint))
        except Mismatch as mismatch:
            raise PlanError(f"{named.format(name + mismatch.path)} {mismatch.says(value, hint)}.") from None


def check_keys(cls: type, values: Mapping[str, Any], word: str = "key") -> None:
    """Raise `Mismatch` for a table with a key that is no field of a dataclass, or without one that it needs.

    ``word``: what a message calls a key.
    """
    known = fields(cls)
    for key in values:
        if key not in known:
            listed = ", ".join(known) or "none"
            raise Mismatch(problem=f"has no {word} '{cut(str(key))}'.{nearest(str(key), known)} Its {word}s: {listed}")
    for name, hint in known.items():
        if name not in values and default(cls, name) is MISSING:
            raise Mismatch(problem=f"needs {word} '{name}': {describe(hint)}")


def changed(instance: Any) -> dict[str, Any]:
    """The fields of a dataclass that differ from their defaults, in their TOML form."""
    values = {name: getattr(instance, name) for name in fields(type(instance))}
    return {name: plain(one) for name, one in values.items() if one != default(type(instance), name)}


def table_schema(cls: type) -> dict[str, Any]:
    """The JSON schema of a dataclass's table; a default is shown where it has a plain form.

    Raises `PassError` for fields that cannot make the trip through a plan's text and back.
    """
    properties: dict[str, Any] = {}
    required = []
    for name, hint in fields(cls).items():
        properties[name] = schema(hint)
        usual = default(cls, name)
        if type(None) in members(hint) and usual is not None:
            where = f"{cls.__qualname__}.{name}"
            raise PassError(f"{where} allows None, so None must be its default: a plan has no word for None.")
        if usual is MISSING:
            required.append(name)
        elif usual is not None:
            properties[name]["default"] = plain(usual)
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


# ---------------------------------------------------------------- one value


def members(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint itself as the only one."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def convert(value: Any, hint: Any) -> Any:
    """Return `value` as an instance of `hint`: lists become tuples, dicts become frozen; nothing is guessed.

    `True` is not an int, "8" is not a number, nan is refused because it is not equal to itself. An int is
    accepted for a float. Raises `Mismatch` when the value does not fit, `PassError` for an unknown hint.
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _first_member(value, args)
    if origin is Literal:
        return _literal(value, args)
    if origin is tuple:
        return _tuple(value, args)
    if origin is dict:
        return _table(value, args[1])
    return _record(value, hint) if _is_record(hint) else _scalar(value, hint)


def _scalar(value: Any, hint: Any) -> Any:
    if hint is type(None):
        return _require(value, value is None)
    if hint is bool:
        return _require(value, type(value) is bool)
    if hint is str:
        return _text(_require(value, type(value) is str and _encodes(value)))
    _require(value, not isinstance(value, bool))
    if hint is int:  # numbers.Integral: sizes and factors often arrive as numpy integers
        return int(_require(value, isinstance(value, numbers.Integral) and -INT64 <= int(value) < INT64))
    if hint is float:
        return _float(_require(value, isinstance(value, numbers.Real)))
    raise _not_plain(hint)


def _text(value: str) -> str:
    if len(value) > limits.NAME:
        raise Mismatch(f"a text of at most {limits.NAME} characters")
    return value


def _float(value: Any) -> float:
    try:
        found = float(value)
    except OverflowError:  # an integer beyond all floats
        raise Mismatch from None
    return _require(found, not math.isnan(found))


def _encodes(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)  # lone surrogates have no UTF-8 form


def _not_plain(hint: Any) -> PassError:
    return PassError(f"an option of a pass cannot be declared as {hint!r}; use plain types or not_in_plan()")


def _require(value: Any, fits: bool) -> Any:
    if not fits:
        raise Mismatch
    return value


def _first_member(value: Any, hints: tuple[Any, ...]) -> Any:
    # int before float: 8 for `float | int` must stay the int that the user wrote.
    told = Mismatch()
    for hint in sorted(hints, key=lambda one: one is float):
        try:
            return convert(value, hint)
        except Mismatch as mismatch:
            told = mismatch if mismatch.problem else told
    raise told


def _literal(value: Any, allowed: tuple[Any, ...]) -> Any:
    return _require(value, any(type(value) is type(one) and value == one for one in allowed))


def _tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    _require(value, isinstance(value, (list, tuple)))
    if len(value) > limits.ITEMS:
        raise Mismatch(f"a list of at most {limits.ITEMS} entries")
    if len(args) == 2 and args[1] is Ellipsis:
        args = args[:1] * len(value)
    _require(value, len(value) == len(args))
    return tuple(_inside(one, hint, f"[{i}]") for i, (one, hint) in enumerate(zip(value, args, strict=True)))


def _table(value: Any, hint: Any) -> FrozenDict:
    _require(value, isinstance(value, dict) and all(type(key) is str for key in value))
    return FrozenDict({key: convert(one, hint) for key, one in value.items()})


def _is_record(hint: Any) -> bool:
    return dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint.__dataclass_params__.frozen  # type: ignore[attr-defined]


def _record(value: Any, cls: Any) -> Any:
    if isinstance(value, cls):  # made anew, so that what it holds is checked whoever made it
        value = {name: getattr(value, name) for name in fields(cls)}
    _require(value, isinstance(value, dict))
    check_keys(cls, value)
    return cls(**{name: _inside(one, fields(cls)[name], f".{name}", told=True) for name, one in value.items()})


def _inside(value: Any, hint: Any, step: str, told: bool = False) -> Any:
    """As `convert`; a mismatch says how to get to what is wrong, where it was inside a table or is ``told`` of."""
    try:
        return convert(value, hint)
    except Mismatch as mismatch:
        if not told and not mismatch.problem:
            raise
        raise Mismatch(path=step + mismatch.path, problem=mismatch.says(value, hint)) from None


def plain(value: Any) -> Any:
    """The TOML form of a checked value: tuples become lists, frozen dicts and dataclasses become dicts."""
    if dataclasses.is_dataclass(value):
        return changed(value)
    if isinstance(value, tuple):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return value


def describe(hint: Any) -> str:
    """What a hint allows, in words for an error message: 'one of "widen", "keep"', 'a list of integers'."""
    return " or ".join(_words(hint))


_ONE = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a text",
    type(None): "left out (None)",
}
_MANY = {bool: "true/false", int: "integers", float: "numbers", str: "texts"}


def _words(hint: Any) -> Iterator[str]:
    for one in members(hint):
        origin, args = get_origin(one), get_args(one)
        if origin is Literal:
            yield "one of " + ", ".join(f'"{each}"' if isinstance(each, str) else str(each) for each in args)
        elif origin is tuple and len(args) == 2 and args[1] is Ellipsis:
            yield f"a list of {_MANY.get(args[0]) or f'({describe(args[0])})'}"
        elif origin is tuple:
            yield f"a list of {len(args)}: " + ", ".join(describe(each) for each in args)
        elif origin is dict:
            yield f"a table of names to {_MANY.get(args[1]) or describe(args[1])}"
        elif _is_record(one):
            yield f"a table of {', '.join(fields(one))}"
        else:
            yield _ONE.get(one, str(one))


_JSON = {bool: "boolean", int: "integer", float: "number", str: "string"}


def schema(hint: Any) -> dict[str, Any]:
    """The JSON schema of a hint. `None` has no TOML spelling: a union is the schema of its other members."""
    alternatives = [_schema(one) for one in members(hint) if one is not type(None)]
    return alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}


def _schema(hint: Any) -> dict[str, Any]:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal and all(type(one) in (str, int, bool) for one in args):
        return {"enum": list(args)}
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        return {"type": "array", "items": schema(args[0])}
    if origin is tuple:
        size = len(args)
        return {
            "type": "array",
            "prefixItems": [schema(one) for one in args],
            "minItems": size,
            "maxItems": size,
        }
    if origin is dict and args[0] is str:
        return {"type": "object", "additionalProperties": schema(args[1])}
    if _is_record(hint):
        return table_schema(hint)
    if hint not in _JSON:
        raise _not_plain(hint)
    return {"type": _JSON[hint]}
