"""What a model's Python decides by sizes, heard while torch.export traces it with free ones.

torch.export guards every comparison of sizes, most of which decide nothing of the graph: whether a tensor lies in
memory without gaps, whether a kernel takes a size. While operations are being recorded, a comparison or a conversion to
a number is the model's own and becomes a rule of the graph (`splitfx.ir.sizes`); inside an operation it is answered
with the traced size and forgotten, which also saves the time to prove it.

The private pieces of torch that this leans on (``ShapeEnv.evaluate_expr``, ``get_proxy_mode``, sympy classes by name)
are in this file alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import sympy
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from splitfx.errors import UnsupportedError
from splitfx.frontend.raising import foreign_folders
from splitfx.ir.schema import arguments, aten_name
from splitfx.ir.sizes import Expr, Rule, Sizes, require_short

LONGEST = 400  # terms of a size that is still followed; longer ones take torch minutes
_INDEXING = ("__getitem__", "__setitem__")
_NAMES = {
    "Equality": "eq", "Unequality": "ne", "StrictLessThan": "lt", "LessThan": "le", "StrictGreaterThan": "gt",
    "GreaterThan": "ge", "And": "and", "Or": "or", "Not": "not", "Add": "add", "Mul": "mul", "FloorDiv": "floordiv",
    "CleanDiv": "floordiv", "IntTrueDiv": "div", "FloatTrueDiv": "div", "Mod": "mod", "PythonMod": "mod", "Max": "max",
    "Min": "min", "ToFloat": "float", "TruncToInt": "trunc", "FloorToInt": "floor", "CeilToInt": "ceil",
    "RoundToInt": "round",
}  # fmt: skip


class TooLong(UnsupportedError):
    """Sizes follow from the inputs' by more steps than are followed, or by one that has no plain form."""


class SizeOfOne(UnsupportedError):
    """A size that follows from the inputs' is one at the traced sizes: a case apart for all that broadcasts."""


class Heard:
    """What was decided, in order: the expression, its value at the traced sizes, and where."""

    def __init__(self, model: nn.Module, ones: bool) -> None:
        self.ones = ones
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.decided: dict[tuple[Any, Any], str] = {}
        self._short: set[Any] = set()

    def note(self, expr: Any, value: Any) -> None:
        if expr.free_symbols:
            self.decided.setdefault((expr, value), self._where())

    def one(self, expr: Any) -> None:
        """An operation has asked whether a size is one, and it is: what it makes then has a one written in."""
        if not self.ones:
            raise SizeOfOne(f"a size in {self._where() or 'the model'} is one at these sizes")
        self.note(expr, sympy.true)

    def follow(self, expr: Any) -> None:
        """Raise `TooLong` for an expression that torch would take too long to work with."""
        if expr not in self._short:
            for number, _ in enumerate(sympy.preorder_traversal(expr)):
                if number > LONGEST:
                    raise TooLong(
                        f"the sizes in {self._where() or 'the model'} follow from the inputs' by too many steps"
                    )
            self._short.add(expr)

    def _where(self) -> str:
        frame, line = sys._getframe(2), ""
        while frame is not None:
            name = frame.f_code.co_filename
            if not line and not name.startswith(("<", *foreign_folders())):
                line = "/".join(name.split("/")[-2:]) + f":{frame.f_lineno}"
            path = self.paths.get(id(frame.f_locals.get("self")))
            if line and path is not None:
                return f"{path} at {line}" if path else line
            frame = frame.f_back
        return ""


@contextmanager
def listening(model: nn.Module, ones: bool = True) -> Iterator[Heard]:
    """Within, an export of ``model`` tells what it decides by sizes. Without ``ones`` it raises `SizeOfOne` where a
    size that follows from free ones is one; with them, that it is becomes a rule."""
    heard, original, own_thread = Heard(model, ones), ShapeEnv.evaluate_expr, threading.get_ident()

    def evaluate_expr(self: ShapeEnv, orig_expr: Any, hint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != own_thread:  # somebody else exports or compiles at the same time
            return original(self, orig_expr, hint, *args, **kwargs)
        heard.follow(orig_expr)
        own = get_proxy_mode() is not None and not _of_an_operation(orig_expr)
        if not own and hint is not None and not _pins(orig_expr):
            if _says_one(orig_expr, hint):
                heard.one(orig_expr)
            return sympy.sympify(hint)
        value = original(self, orig_expr, hint, *args, **kwargs)
        if own:
            heard.note(orig_expr, value)
        return value

    ShapeEnv.evaluate_expr = evaluate_expr
    try:
        yield heard
    finally:
        ShapeEnv.evaluate_expr = original


def _pins(expr: Any) -> bool:
    """Says that one size is a number, or another size: the graph has it written in afterwards."""
    sides = expr.args if isinstance(expr, sympy.Eq) else (expr,)
    return all(isinstance(side, sympy.Symbol) or side.is_number for side in sides)


def _says_one(expr: Any, hint: Any) -> bool:
    return bool(hint) and isinstance(expr, sympy.Eq) and 1 in expr.args and bool(expr.free_symbols)


def _of_an_operation(expr: Any) -> bool:
    """A yes or no that an operation asks for inside, about how values lie in memory: Python's own questions pass
    through ``__bool__``; indexing leaves a slice of everything out."""
    if not getattr(expr, "is_Boolean", False) and not isinstance(expr, sympy.logic.boolalg.Boolean):
        return False
    frame = sys._getframe(2)
    while frame is not None and _is_symbolic(frame.f_code.co_filename):
        if frame.f_code.co_name == "__bool__":
            return False
        frame = frame.f_back
    return frame is None or getattr(frame.f_locals.get("func"), "__name__", "") not in _INDEXING


def _is_symbolic(path: str) -> bool:
    return path.endswith(("/sym_node.py", "/symbolic_shapes.py", "/recording.py", "torch/__init__.py"))


# ---------------------------------------------------------------- rules of a program


def sizes_of(program: torch.export.ExportedProgram, heard: Heard, places: list[int], count: int) -> Sizes:
    """For which sizes of its ``count`` inputs a program is right. ``places``: which of them its tensors are, in order.

    Raises `TooLong`.
    """
    inputs = _input_shapes(program)
    known = {s.node._expr: ("size", p, d) for p, shape in zip(places, inputs, strict=True) for d, s in _symbolic(shape)}
    fixed: list[tuple[int, ...]] = [()] * count
    rules: dict[Expr, str] = {}
    for place, shape in zip(places, inputs, strict=True):
        fixed[place] = tuple(d for d, s in enumerate(shape) if not isinstance(s, torch.SymInt) or s.node.expr.is_number)
        for dim, size in _symbolic(shape):
            if not size.node.expr.is_number and size.node.expr != size.node._expr:
                rules[("eq", ("size", place, dim), plain(size.node.expr, known))] = "two sizes that meet"
    for (expr, value), where in heard.decided.items():
        if expr.free_symbols <= known.keys():
            rules.setdefault(_rule(plain(expr, known), value), where)
    for expr, where in _of_lists(program, known):
        rules.setdefault(expr, where)
    found = Sizes(tuple(fixed), tuple(Rule(expr, where) for expr, where in rules.items() if _reads_free(expr, fixed)))
    try:
        require_short(found)
    except ValueError as error:
        raise TooLong(str(error)) from error
    return found


def where_fixed(heard: Heard, program: torch.export.ExportedProgram, place: int, dim: int) -> str:
    """The line that fixed a size of the ``place``-th tensor of a program; empty where an operation did."""
    size = _input_shapes(program)[place][dim]
    symbol = size.node._expr if isinstance(size, torch.SymInt) else None
    return next((where for (expr, _), where in heard.decided.items() if symbol in expr.free_symbols), "")


def _reads_free(expr: Expr, fixed: list[tuple[int, ...]]) -> bool:
    """Whether an expression reads a size that may differ: any other holds anyway."""
    if not isinstance(expr, tuple):
        return False
    name, *operands = expr
    return operands[1] not in fixed[operands[0]] if name == "size" else any(_reads_free(o, fixed) for o in operands)


def _rule(expr: Expr, value: Any) -> Expr:
    if value in (sympy.true, True):
        return expr
    if value in (sympy.false, False):
        return ("not", expr)
    return ("eq", expr, float(value) if isinstance(value, sympy.Float) else int(value))


def _input_shapes(program: torch.export.ExportedProgram) -> list[Any]:
    names = program.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    found = [values.get(name) if isinstance(name, str) else None for name in names]
    return [value.shape for value in found if isinstance(value, torch.Tensor)]


def _symbolic(shape: Any) -> Iterator[tuple[int, torch.SymInt]]:
    return ((d, s) for d, s in enumerate(shape) if isinstance(s, torch.SymInt) and _symbols(s.node._expr))


def _symbols(expr: Any) -> set[Any]:
    return expr.free_symbols


def _of_lists(program: torch.export.ExportedProgram, names: dict[Any, Expr]) -> Iterator[tuple[Expr, str]]:
    """How many parts a split gives, and which dims a squeeze removes, is written into the graph."""
    for node in program.graph.nodes:
        name = aten_name(node.target) if node.op == "call_function" else ""
        if not name.endswith(("split", "chunk", "unbind", "squeeze", "split_with_sizes")) or name == "unsqueeze":
            continue
        bound: dict[str, Any] = arguments(node)
        value, dims = bound["self"].meta["val"], bound.get("dim")
        dims = range(value.dim()) if dims is None else dims if isinstance(dims, list | tuple) else [dims]
        for dim, size in _symbolic(value.shape):
            if any(int(d) % value.dim() == dim for d in dims) and not size.node.expr.is_number:
                one = 1 if name == "squeeze" else size.node.hint
                expr = ("eq", plain(size.node.expr, names), one)
                yield (("not", expr) if name == "squeeze" else expr), f"a {name} of it"


def plain(expr: Any, names: dict[Any, Expr]) -> Expr:
    """A sympy expression as plain data. Raises `TooLong` for what has no plain form."""
    if expr in names:
        return names[expr]
    if expr.is_number:
        return int(expr) if expr.is_integer else float(expr)
    kind, operands = type(expr).__name__, expr.args
    if kind in ("Pow", "PowByNatural") and operands[1].is_number and operands[1] in (2, 3):
        return ("mul", *[plain(operands[0], names)] * int(operands[1]))
    if kind == "Identity":
        return plain(operands[0], names)
    if kind not in _NAMES:
        raise TooLong(f"a size is computed by {kind}, which no rule can say")
    return (_NAMES[kind], *(plain(part, names) for part in operands))
