"""Copies of module trees over the same tensors, of which nothing reaches back into the tree that was copied.

deepcopy takes functions for values that cannot change. One that holds a part of the model, in a closure or a default
(``self.steps = [lambda x: self.conv(x)]``, a hook that keeps what it sees), would still call and write the user's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


def anew(module: nn.Module, tensor: Callable[[torch.Tensor], torch.Tensor] = lambda t: t) -> nn.Module:
    """The module tree once more over the same tensors, or over ``tensor(t)`` of each; nothing else that can be changed
    is shared, hooks included, and no function holds a part of the tree that was copied."""
    memo: dict[int, Any] = {}
    modules = {id(one) for one in module.modules()}
    reach: dict[FunctionType, bool] = {}
    for one in module.modules():
        leaves = pytree.tree_leaves([v for k, v in vars(one).items() if k != "_modules"])
        memo.update({id(t): tensor(t) for t in leaves if isinstance(t, torch.Tensor) and id(t) not in memo})
        for leaf in leaves:
            _reaches(leaf, modules, reach)
    made = {function: _emptied(function) for function, found in reach.items() if found}
    memo |= {id(function): empty for function, empty in made.items()}
    copied = copy.deepcopy(module, memo)
    ours = memo.keys() & (modules | {id(function) for function in made})
    for function, empty in made.items():
        _fill(empty, function, lambda value: memo[id(value)] if id(value) in ours else value)
    return copied


def unhooked(module: nn.Module) -> nn.Module:
    """`anew`, without the module's own hooks: for a layer that becomes others, since a hook expects the whole one."""
    bare = copy.copy(module)
    bare.__dict__.update({name: value for name, value in vars(nn.Module()).items() if "hooks" in name})
    return anew(bare)


def _reaches(value: Any, modules: set[int], known: dict[FunctionType, bool]) -> bool:
    """Whether it is one of the modules, or a function that holds one."""
    if not isinstance(value, FunctionType):
        return id(value) in modules
    if value not in known:
        known[value] = False
        cells = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        held = (*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values())
        known[value] = any([_reaches(one, modules, known) for one in held])  # noqa: C419, all of them are to be known
    return known[value]


def _filled(cell: CellType) -> bool:
    return cell != CellType()


def _emptied(function: FunctionType) -> FunctionType:
    cells = tuple(CellType() for _ in function.__closure__ or ())
    made = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells)
    made.__dict__.update(function.__dict__)
    made.__qualname__ = function.__qualname__
    return made


def _fill(made: FunctionType, function: FunctionType, again: Callable[[Any], Any]) -> None:
    for cell, empty in zip(function.__closure__ or (), made.__closure__ or (), strict=True):
        if _filled(cell):
            empty.cell_contents = again(cell.cell_contents)
    if function.__defaults__ is not None:
        made.__defaults__ = tuple(map(again, function.__defaults__))
    if function.__kwdefaults__ is not None:
        made.__kwdefaults__ = {name: again(value) for name, value in function.__kwdefaults__.items()}
