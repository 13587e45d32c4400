"""Arguments: which part of which argument each input of a graph is, so that a call gives them by name and by key.

The order in which a caller writes keywords or the keys of a dict says nothing: the model's own signature does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx
from torch.fx.graph import _PyTreeCodeGen
from torch.utils import _pytree as pytree

Argument = tuple[str, str]  # the argument's name, and where in it: "" for all of it, "['mask']" for an entry


def arguments_of(graph: fx.GraphModule) -> tuple[Argument, ...]:
    """For every placeholder of a canonical graph the argument that it comes from."""
    names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    codegen = graph.graph._codegen
    if not isinstance(codegen, _PyTreeCodeGen):
        return tuple((name, "") for name in names)
    known = codegen.pytree_info
    args, kwargs = pytree.tree_unflatten(list(range(len(names))), known.in_spec)
    found: dict[int, Argument] = {}
    for name, held in [*zip(known.orig_args, args, strict=False), *kwargs.items()]:
        for path, leaf in pytree.tree_flatten_with_path(held)[0]:
            found[leaf] = name, pytree.keystr(path)
    return tuple(found[i] for i in range(len(names)))


def bound(arguments: Sequence[Argument], args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """The inputs in the graph's order, from the arguments of a call. Raises `ValueError` that says what is wrong."""
    names = list(dict.fromkeys(name for name, _ in arguments))
    told = f"the model takes {len(arguments)} inputs ({', '.join(name + where for name, where in arguments)})"
    twice = next((name for name in names[: len(args)] if name in kwargs), None)
    if twice is not None:
        raise ValueError(f"{told}; {twice} is given twice")
    given: dict[Argument, Any] = {}
    unnamed = [(f"argument {i + 1}", one) for i, one in enumerate(args[len(names) :], len(names))]
    for name, held in [*zip(names, args, strict=False), *unnamed, *kwargs.items()]:
        given |= {(name, pytree.keystr(path)): leaf for path, leaf in pytree.tree_flatten_with_path(held)[0]}
    if set(given) != set(arguments):
        raise ValueError(f"{told}; {len(given)} given: {', '.join(name + where for name, where in given) or 'none'}")
    return [given[one] for one in arguments]
