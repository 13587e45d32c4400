"""Sizes: for which sizes of its inputs a graph is right, and the check of every call.

A graph is traced at one size and may serve others: where the model's Python reads a size and decides by it, which
branch it took is a `Rule`; sizes that are written into the graph are fixed. Both are plain data, so that a saved graph
keeps them. A call at a size that breaks one raises `UnsupportedError` in one line before anything is computed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from splitfx.errors import UnsupportedError
from splitfx.text import one_line

Expr = Any  # a number, or a tuple: ("size", input, dim) or (name in FUNCTIONS, operand, ...)

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and": lambda *values: all(values),
    "or": lambda *values: any(values),
    "not": operator.not_,
    "add": lambda *values: sum(values[1:], values[0]),
    "mul": lambda *values: math.prod(values),
    "floordiv": operator.floordiv,
    "div": operator.truediv,
    "mod": operator.mod,
    "max": lambda *values: _most(values, torch.sym_max),
    "min": lambda *values: _most(values, torch.sym_min),
    "float": torch.sym_float,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
}
_SIGNS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "and": "and", "or": "or",
          "add": "+", "mul": "*", "floordiv": "//", "div": "/", "mod": "%"}  # fmt: skip


def _most(values: Sequence[Any], pick: Callable[[Any, Any], Any]) -> Any:
    found = values[0]
    for value in values[1:]:
        found = pick(found, value)
    return found


@dataclass(frozen=True)
class Rule:
    """What holds at every size for which the graph is right. ``where``: the layer, or line, that decides by it."""

    holds: Expr
    where: str = ""


@dataclass(frozen=True)
class Sizes:
    """``fixed``: for each input of the graph the dims that must be as they were traced. All others may differ as far
    as ``rules`` allow it."""

    fixed: tuple[tuple[int, ...], ...] = ()
    rules: tuple[Rule, ...] = ()

    @property
    def bound(self) -> bool:
        """Whether any size is held to something: a graph of a model that reads no sizes reads none itself."""
        return any(self.fixed) or bool(self.rules)

    def free(self, place: int, dim: int) -> bool:
        """Whether a dim of an input may differ from the traced one."""
        return place >= len(self.fixed) or dim not in self.fixed[place]

    def broken(self, traced: Sequence[Any], given: Sequence[Any]) -> str:
        """What speaks against sizes ``given`` (one tuple for each input, None for no tensor); empty where nothing does.

        Raises nothing, computes no tensor.
        """
        for place, (was, now) in enumerate(zip(traced, given, strict=True)):
            if was is None and now is None:
                continue
            if was is None or now is None or len(was) != len(now):
                return f"input {place} has another number of dims"
            for dim in self.fixed[place] if place < len(self.fixed) else ():
                if now[dim] != was[dim]:
                    return f"size {dim} of input {place} is fixed to {was[dim]}"
        for rule in self.rules:
            if not evaluate(rule.holds, given):
                return f"the model wants {words(rule.holds)}" + (f" ({rule.where})" if rule.where else "")
        return ""


MOST = 5_000  # terms of all rules of a graph
DEEPEST = 60  # functions of functions
_ONE = frozenset({"not", "float", "trunc", "floor", "ceil", "round"})
_MANY = frozenset({"and", "or", "add", "mul", "max", "min"})  # all others are of two


def encode(sizes: Sizes) -> dict[str, Any]:
    """As JSON types, the form of `splitfx.storage.stored.Free`."""

    def listed(expr: Expr) -> Any:
        return [listed(one) for one in expr] if isinstance(expr, tuple) else expr

    rules = [{"holds": listed(rule.holds), "where": rule.where} for rule in sizes.rules]
    return {"fixed": [list(dims) for dims in sizes.fixed], "rules": rules}


def decode(plain: Any, shapes: Sequence[Any]) -> Sizes:
    """The sizes of a ``splitfx.storage.stored.Free``, for inputs of these traced sizes. Raises `ValueError`."""
    if len(plain.fixed) > len(shapes):
        raise ValueError("more inputs have fixed sizes than there are")
    for dims, shape in zip(plain.fixed, shapes, strict=False):
        if any(dim >= len(shape or ()) for dim in dims):
            raise ValueError("a dim that is fixed is none of its input")
    left = [MOST]
    rules = tuple(Rule(_read(rule.holds, shapes, left, 0), one_line(rule.where, 200)) for rule in plain.rules)
    sizes = Sizes(tuple(tuple(dims) for dims in plain.fixed), rules)
    why = sizes.broken(shapes, shapes)
    if why:
        raise ValueError(f"the rules of sizes do not fit the sizes that were traced: {why[:200]}")
    return sizes


def require_short(sizes: Sizes) -> None:
    """Raise `ValueError` for more rules than `decode` reads."""
    left = [MOST]
    for rule in sizes.rules:
        _read(rule.holds, None, left, 0)
    if len(sizes.rules) > 1000:
        raise ValueError("the rules of sizes are too many")


def _read(plain: Any, shapes: Sequence[Any] | None, left: list[int], depth: int) -> Expr:
    left[0] -= 1
    if left[0] < 0 or depth > DEEPEST:
        raise ValueError("the rules of sizes are too long")
    if isinstance(plain, int | float):
        if abs(plain) <= 2**53:
            return plain
        raise ValueError("a number in the rules of sizes is too large")
    if not isinstance(plain, list | tuple) or not plain or not isinstance(plain[0], str):
        raise ValueError("a rule of sizes is made of functions and numbers")
    name, *operands = plain
    if name == "size" and len(operands) == 2:
        place, dim = operands
        if shapes is None or (_within(place, len(shapes)) and _within(dim, len(shapes[place] or ()))):
            return name, place, dim
        raise ValueError("a rule of sizes reads a size that there is not")
    wanted = (1, 1) if name in _ONE else (1, 100) if name in _MANY else (2, 2)
    if name not in FUNCTIONS or not wanted[0] <= len(operands) <= wanted[1]:
        raise ValueError("a rule of sizes uses a function that there is not")
    return (name, *(_read(one, shapes, left, depth + 1) for one in operands))


def _within(given: Any, count: int) -> bool:
    return type(given) is int and 0 <= given < count


def evaluate(expr: Expr, shapes: Sequence[Any]) -> Any:
    """The value of an expression for the sizes of a graph's inputs; False where it divides by nothing."""
    if not isinstance(expr, tuple):
        return expr
    name, *operands = expr
    if name == "size":
        return shapes[operands[0]][operands[1]]
    values = [evaluate(one, shapes) for one in operands]
    try:
        return FUNCTIONS[name](*values)
    except (ZeroDivisionError, OverflowError, ValueError):  # the last: a conversion of what is no number
        return False


def words(expr: Expr) -> str:
    """An expression as a reader writes it: ``x0[2] % 8 == 0``, where x0[2] is size 2 of the first input."""
    if not isinstance(expr, tuple):
        return str(expr)
    name, *operands = expr
    if name == "size":
        return f"x{operands[0]}[{operands[1]}]"
    told = [f"({words(o)})" if isinstance(o, tuple) and o[0] in _SIGNS else words(o) for o in operands]
    return f" {_SIGNS[name]} ".join(told) if name in _SIGNS else f"{name}({', '.join(told)})"


def refusal(model: str, traced: Sequence[Any], given: Sequence[Any], why: str, sizes: Sizes) -> UnsupportedError:
    """The one line for a call at sizes that do not fit: what was traced, what came, what is allowed."""
    allowed = " and ".join(
        "x".join("?" if sizes.free(i, d) else str(n) for d, n in enumerate(shape))
        for i, shape in enumerate(traced)
        if shape is not None
    )
    if len(why) > 400:
        why = f"{why[:400]} ..."
    return UnsupportedError(
        f"{model} was traced for inputs of {_listed(traced)} and got {_listed(given)}: {why}. It takes {allowed} "
        "(? may differ): give such inputs, or trace the model again with example inputs of these sizes"
    )


def _listed(shapes: Sequence[Any]) -> str:
    return " and ".join("x".join(map(str, s)) or "a number" for s in shapes if s is not None)
