"""Values that JSON has no form for: written as dicts with one key that says what they are, and read back.

Each kind of value is written and read side by side: arguments and options, the containers around what a graph takes
and gives, and the tensors that it takes.
Refuses: what has no plain form (`NoPlainForm`); on the way back unknown words and unusable names (`ValueError`).
Promises: nothing is imported, evaluated or allocated.
"""

from __future__ import annotations

import cmath
import math
from collections import namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import msgspec
import torch
from torch import fx
from torch.utils import _pytree as pytree

from splitfx.ground import names
from splitfx.ir.graph import TensorSpec
from splitfx.storage.stored import Form

DTYPES = {
    str(one).removeprefix("torch."): one
    for one in vars(torch).values()
    if isinstance(one, torch.dtype) and not str(one).startswith(("torch.q", "torch.bits"))
}
FORMATS = {str(one).removeprefix("torch."): one for one in (torch.contiguous_format, torch.preserve_format,
                                                           torch.channels_last, torch.channels_last_3d)}  # fmt: skip
WORDS: dict[str, Mapping[str, Any]] = {"dtype": DTYPES, "memory_format": FORMATS, "layout": {"strided": torch.strided}}


class NoPlainForm(Exception):
    """This graph cannot be written as plain data; the message says what stands in the way."""


# ---------------------------------------------------------------- arguments and options


def encode(value: Any) -> Any:
    """Plain values as themselves; everything else as a dict with one key that says what it is."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [encode(one) for one in value]}
    if isinstance(value, list):
        return [encode(one) for one in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(one)] for key, one in value.items()]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [encode(value.start), encode(value.stop), encode(value.step)]}
    if isinstance(value, complex) and cmath.isfinite(value):
        return {"complex": [value.real, value.imag]}
    if value is Ellipsis:
        return {"ellipsis": 0}
    if isinstance(value, torch.device):
        return {"device": value.type}
    return _encode_word(value)


def _encode_word(value: Any) -> Any:
    for kind, table in WORDS.items():
        if (name := str(value).removeprefix("torch.")) in table and table[name] is value:
            return {kind: name}
    raise NoPlainForm(f"a value of type {type(value).__name__} has no plain form")


def decode(plain: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The inverse of `encode`. Raises `ValueError`."""
    if isinstance(plain, list):
        return [decode(one, nodes) for one in plain]
    if not isinstance(plain, dict):
        return plain
    word, held = _single(plain)
    table = nodes if word == "node" else WORDS.get(word)
    if table is not None:
        if not isinstance(held, str) or held not in table:
            raise ValueError(f"an unknown {word}: {str(held)[:80]}")
        return table[held]
    readers = {
        "tuple": lambda: tuple(decode(one, nodes) for one in held),
        "dict": lambda: {decode(key, nodes): decode(one, nodes) for key, one in held},
        "slice": lambda: slice(*(decode(one, nodes) for one in held)),
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


# ---------------------------------------------------------------- tensors without their values


def encode_tensor(tensor: TensorSpec | torch.Tensor) -> dict[str, Any]:
    form = {"shape": [int(size) for size in tensor.shape], "dtype": encode(tensor.dtype)}
    return {**form, "high": tensor.high} if isinstance(tensor, TensorSpec) else form


def decode_tensor(form: Form) -> TensorSpec:
    dtype = decode(form.dtype, {})
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"an unknown dtype: {str(dtype)[:80]}")
    return TensorSpec(tuple(form.shape), dtype, "cpu", form.high)


def encode_input(spec: Any) -> Any:
    """What an input takes: a tensor, or the constant that was given."""
    return {"tensor": encode_tensor(spec)} if isinstance(spec, TensorSpec) else encode(spec)


def decode_input(plain: Any) -> Any:
    if isinstance(plain, dict) and "tensor" in plain:
        return decode_tensor(msgspec.convert(plain["tensor"], Form))
    return decode(plain, {})


# ---------------------------------------------------------------- containers


def encode_structure(spec: pytree.TreeSpec | None) -> Any:
    """A pytree structure: "*" for a leaf, else one container; dataclasses are written as dicts."""
    if spec is None:
        return None
    leaves = iter(range(spec.num_leaves))
    plain = _container(pytree.tree_unflatten(range(spec.num_leaves), spec), leaves)
    if next(leaves, None) is not None:
        raise NoPlainForm("an input or output container hides some of its tensors")
    return plain


def _container(tree: Any, leaves: Iterator[int]) -> Any:
    if isinstance(tree, int):
        if tree != next(leaves, None):
            raise NoPlainForm("an input or output container reorders its tensors")
        return "*"
    if is_dataclass(tree):  # pytree leaves out fields that are None
        tree = {one.name: getattr(tree, one.name) for one in fields(tree) if getattr(tree, one.name) is not None}
    if isinstance(tree, Mapping):
        return {"dict": [[key, _container(one, leaves)] for key, one in tree.items()]}
    names = getattr(tree, "_fields", None)
    if isinstance(tree, tuple) and names is not None:
        children = [_container(one, leaves) for one in tree]
        return {"namedtuple": [type(tree).__name__, list(names), children]}
    if isinstance(tree, tuple | list):
        return {"tuple" if isinstance(tree, tuple) else "list": [_container(one, leaves) for one in tree]}
    raise NoPlainForm(f"an input or output is a {type(tree).__name__}, which exists only in its own code")


def decode_structure(plain: Any) -> Any:
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
