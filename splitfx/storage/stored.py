"""What a stored program is, as types, and the values in it.

Does: decodes the JSON of a program into structs, every name in it held to the grammar (`splitfx.ground.names`); reads
values that JSON has no form for from dicts with one key that says what they are.
Refuses (`ValueError`, with the place in the document): fields that are missing, unknown or of another type.
Promises: nothing is imported, evaluated or allocated.
"""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta, Struct
from torch import fx
from torch.utils import _pytree as pytree

from splitfx.files.typed import require_ordinary
from splitfx.ground import names
from splitfx.ir.notes import Note
from splitfx.storage.operators import LARGEST

DTYPES = {
    str(one).removeprefix("torch."): one
    for one in vars(torch).values()
    if isinstance(one, torch.dtype) and not str(one).startswith(("torch.q", "torch.bits"))
}
FORMATS = {str(one).removeprefix("torch."): one for one in (torch.contiguous_format, torch.preserve_format,
                                                           torch.channels_last, torch.channels_last_3d)}  # fmt: skip
LAYOUTS = {"strided": torch.strided}

Count = Annotated[int, Meta(ge=0, le=LARGEST)]


class Name(str):
    """A name in Python."""


class Path(str):
    """The dotted path of a layer or a tensor."""


class Node(Struct, forbid_unknown_fields=True):
    op: Literal["placeholder", "get_attr", "call_module", "call_function", "output"]
    name: Name
    target: str
    args: list[Any]
    kwargs: dict[str, Any]
    layer: str

    def __post_init__(self) -> None:
        _hold_keys(Name, self.kwargs)


class Layer(Struct, forbid_unknown_fields=True):
    """``nodes``, ``layers`` and ``norms`` are those of a layer that holds a graph of its own."""

    kind: str = msgspec.field(name="class")
    options: dict[str, Any]
    instead_of: str = ""
    nodes: list[Node] = []
    layers: dict[str, Layer] = {}
    norms: dict[str, Layer] = {}

    def __post_init__(self) -> None:
        _hold_keys(Path, self.layers)
        _hold_keys(Name, self.norms)


class Tree(Struct, forbid_unknown_fields=True):
    """Containers around what the graph takes and gives."""

    args: list[Name]
    inside: Any = msgspec.field(name="in")
    outside: Any = msgspec.field(name="out")


class Form(Struct, forbid_unknown_fields=True):
    """A tensor without its values."""

    shape: Annotated[list[Count], Meta(max_length=32)]
    dtype: Any
    high: Annotated[int, Meta(ge=-(2**62), le=2**62)] | None = None


class Rule(Struct, forbid_unknown_fields=True):
    """``holds``: an expression of `splitfx.ir.sizes`, as lists."""

    holds: Any
    where: Annotated[str, Meta(max_length=1000)] = ""


class Free(Struct, forbid_unknown_fields=True):
    """See `splitfx.ir.sizes.Sizes`."""

    fixed: Annotated[list[Annotated[list[Count], Meta(max_length=32)]], Meta(max_length=1000)]
    rules: Annotated[list[Rule], Meta(max_length=1000)]


class Info(Struct, forbid_unknown_fields=True):
    """See `splitfx.ir.graph.TraceInfo`."""

    inputs: list[Any]
    in_spec: Any
    model_class: Name
    front_end: str
    sizes: Free
    notes: list[Note]
    train_only: list[str]
    untouched: list[str]
    aliases: dict[str, Path]

    def __post_init__(self) -> None:
        _hold_keys(Path, self.aliases)


class Program(Struct, forbid_unknown_fields=True):
    """``outputs``: the tensors that the graph gives for inputs of the traced sizes."""

    nodes: list[Node]
    layers: dict[str, Layer]
    tree: Tree | None
    info: Info
    outputs: list[Form] | None = None

    def __post_init__(self) -> None:
        _hold_keys(Path, self.layers)


def decoded(plain: Any) -> Program:
    """The program in JSON's types. Raises `ValueError`, in one line with the place in the document."""
    require_ordinary(plain)
    return msgspec.convert(plain, Program, dec_hook=_held_to_grammar)


def _held_to_grammar(kind: type, given: Any) -> Any:
    if (names.is_name if kind is Name else names.is_path)(given):
        return kind(given)
    raise ValueError(f"an unusable {'name' if kind is Name else 'layer path'}: {str(given)[:80]!r}")


def _hold_keys(kind: type, given: Mapping[str, Any]) -> None:
    """msgspec looks at the values of a dict alone."""
    for key in given:
        _held_to_grammar(kind, key)


# ---------------------------------------------------------------- values


def value(plain: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The inverse of `splitfx.storage.program.plain_value`. Raises `ValueError`."""
    if isinstance(plain, list):
        return [value(one, nodes) for one in plain]
    if not isinstance(plain, dict):
        return plain
    word, held = _single(plain)
    tables: dict[str, Mapping[str, Any]] = {
        "node": nodes, "dtype": DTYPES, "memory_format": FORMATS, "layout": LAYOUTS
    }  # fmt: skip
    if word in tables:
        if not isinstance(held, str) or held not in tables[word]:
            raise ValueError(f"an unknown {word}: {str(held)[:80]}")
        return tables[word][held]
    readers = {
        "tuple": lambda: tuple(value(one, nodes) for one in held),
        "dict": lambda: {value(key, nodes): value(one, nodes) for key, one in held},
        "slice": lambda: slice(*(value(one, nodes) for one in held)),
        "float": lambda: float(held),
        "complex": lambda: _finite(*held),
        "ellipsis": lambda: Ellipsis,
        "device": lambda: torch.device("cpu"),  # the loaded program lives where its weights are: on the CPU
    }
    if word not in readers:
        raise ValueError(f"an unknown value: {word[:80]}")
    return readers[word]()


def _single(plain: dict[Any, Any]) -> tuple[str, Any]:
    if len(plain) != 1:
        raise ValueError(f"a value says with one key what it is, not with {len(plain)}")
    return next(iter(plain.items()))


def _finite(real: float, imaginary: float) -> complex:
    if not (math.isfinite(real) and math.isfinite(imaginary)):
        raise ValueError("a complex number that is not finite")
    return complex(real, imaginary)


def tensor_form(plain: Any) -> Form | None:
    """The form of an input, None for one that is no tensor. Raises `ValueError`."""
    if not (isinstance(plain, dict) and "tensor" in plain):
        return None
    return msgspec.convert(plain["tensor"], Form)


def structure(plain: Any) -> Any:
    """The pytree structure of containers; None for None. Raises `ValueError`."""
    return None if plain is None else pytree.tree_flatten(_tree(plain))[1]


def _tree(plain: Any) -> Any:
    if plain == "*":
        return 0
    if not isinstance(plain, dict):
        raise ValueError(f"an unknown container: {str(plain)[:80]}")
    word, held = _single(plain)
    if word == "dict":
        return {_key(key): _tree(one) for key, one in held}
    if word == "namedtuple":
        name, fields, children = held
        if not all(map(names.is_name, (name, *fields))) or len(set(fields)) != len(fields):
            raise ValueError(f"an unusable name: {str((name, *fields))[:80]}")
        return namedtuple(name, fields)(*map(_tree, children))
    if word not in ("tuple", "list"):
        raise ValueError(f"an unknown container: {word[:80]}")
    return tuple(map(_tree, held)) if word == "tuple" else [_tree(one) for one in held]


def _key(key: Any) -> str | int:
    if not isinstance(key, str | int) or (isinstance(key, str) and len(key) > names.LONGEST):
        raise ValueError(f"an unusable key: {str(key)[:80]!r}")
    return key
