"""The plain types that an option of a pass may have: checked, described and turned into a JSON schema.

Does: reads a dataclass's type hints (`bool`, `int`, `float`, `str`, `Literal`, `tuple`, `dict` with text
keys, unions of those, `None` as one member of a union) and checks values against them.
Refuses: any other hint (`PassError`, for the pass's author) and any value outside its hint (`Mismatch`).
Promises: a value that passes is immutable and hashable, and equal after a trip through TOML.
"""

from __future__ import annotations

import math
import numbers
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from splitfx.errors import PassError
from splitfx.ground import limits

INT64 = 2**63  # TOML promises 64-bit integers and no more


class Mismatch(Exception):
    """A value is not of the type that its option declares. Callers turn it into a `PlanError` with names; the text, if
    there is one, says what is allowed."""


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
    return _scalar(value, hint)


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
    for hint in sorted(hints, key=lambda one: one is float):
        try:
            return convert(value, hint)
        except Mismatch:
            continue
    raise Mismatch


def _literal(value: Any, allowed: tuple[Any, ...]) -> Any:
    return _require(value, any(type(value) is type(one) and value == one for one in allowed))


def _tuple(value: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    _require(value, isinstance(value, (list, tuple)))
    if len(value) > limits.ITEMS:
        raise Mismatch(f"a list of at most {limits.ITEMS} entries")
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(convert(one, args[0]) for one in value)
    _require(value, len(value) == len(args))
    return tuple(convert(one, hint) for one, hint in zip(value, args, strict=True))


def _table(value: Any, hint: Any) -> FrozenDict:
    _require(value, isinstance(value, dict) and all(type(key) is str for key in value))
    return FrozenDict({key: convert(one, hint) for key, one in value.items()})


def plain(value: Any) -> Any:
    """The TOML form of a checked value: tuples become lists, frozen dicts become dicts."""
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
    if hint not in _JSON:
        raise _not_plain(hint)
    return {"type": _JSON[hint]}
