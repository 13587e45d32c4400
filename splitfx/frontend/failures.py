"""Why a model cannot be traced, in the user's words: their module, their source line, every front end's
reason.

`check_inputs` refuses what no front end would report well (count, names, device and type of the inputs)
before any tracing; `failure` writes the message after all front ends have given up.
"""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from splitfx.errors import TraceError
from splitfx.frontend.raising import foreign_folders

_NOT_OURS = ("importlib", "contextlib", "networkx")

# Words of torch that show an input or output of a type that it does not know.
_FOREIGN = ("pytree", "type of output", "unsupported input", "input type")


def _instead(given: Any) -> str:
    if isinstance(given, Mapping):
        return ": these are weights; load them into the model that they are of (load_state_dict) and give that"
    if isinstance(given, str | os.PathLike):
        return ": names and files of models are for the command line; make the model and give it"
    return f": give what {given.__name__}() returns" if callable(given) and hasattr(given, "__name__") else ""


def check_model(model: Any) -> None:
    """`TraceError` for what is no model, for TorchScript, and for layers that have no weights yet."""
    if not isinstance(model, nn.Module):
        raise TraceError(f"a model is a torch.nn.Module, not {type(model).__name__}{_instead(model)}")
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            made = "torch.jit.trace" if "Traced" in type(module).__name__ else "torch.jit.script"
            raise TraceError(
                f"{path or 'the model'} ({module.original_name}) is TorchScript, made by {made}: give the nn.Module "
                "that it was made from"
            )
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise TraceError(
                f"{path or 'the model'} ({type(module).__name__}) has no weights before its first call: call the model "
                "once on such inputs before it is traced"
            )


def check_inputs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """`TraceError` when forward does not take these inputs, or none of them fits the parameters' device or
    type.
    """
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        given = ", ".join([f"{len(args)} positional"] + [f"{k}=" for k in kwargs])
        raise TraceError(
            f"{type(model).__name__}.forward{inspect.signature(model.forward)} does not take the example "
            f"inputs ({given}): {error}. Give inputs that model(...) accepts."
        ) from None
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    owned, given = {p.device for p in model.parameters()}, {t.device for t in tensors}
    if owned and given and not given & owned:
        raise TraceError(
            f"the model is on {_listed(owned)}, its example inputs on {_listed(given)}: move one of them, "
            f"for example inputs.to({str(min(map(str, owned)))!r})"
        )
    types = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
    floats = {t.dtype for t in tensors if t.dtype.is_floating_point}
    if types and floats and not floats & types:
        raise TraceError(
            f"the model's parameters are {_listed(types)}, its example inputs {_listed(floats)}: convert "
            f"one of them, for example inputs.to({min(map(str, types))})"
        )


def _listed(things: set[Any]) -> str:
    return ", ".join(sorted(str(t).removeprefix("torch.") for t in things))


def failure(
    model: nn.Module, inputs: Any, problems: list[tuple[str, nn.Module | None, Exception]], *, runs: bool
) -> str:
    """One message for all front ends: where in the user's model, why, and what to do. ``runs``: the model itself runs
    on the inputs."""
    _, _, error = problems[0]
    place, inside = user_line(error), innermost_module(model, [p for _, p, _ in problems], error)
    where = (f" in {inside}" if inside else "") + (f" at {place}" if place else "")
    name, reasons = type(model).__name__, "; ".join(f"{who}: {reason(e)}" for who, _, e in problems)
    if not runs:
        sizes = [tuple(t.shape) for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
        shapes = ", ".join(map(str, sizes)) or "none"
        return (
            f"{name} does not run on the example inputs of shape {shapes}: it fails{where}. {reasons}. "
            "What to do: give inputs that model(...) accepts, or correct the model there."
        )
    return f"{name} cannot be traced{where}. {reasons}. What to do: {_advice(error)}."


def _advice(error: BaseException) -> str:
    words = f"{type(error).__name__} {error}".lower()
    if "numpy" in words:
        return "compute with torch instead of numpy there, or trace a part of the model that does"
    if any(word in words for word in _FOREIGN):
        return "pass and return tensors, numbers, and tuples, lists, dicts or dataclasses of them"
    return (
        "make that code free of Python branches, loops and numbers that depend on tensor values "
        "(torch.where, torch.cond), or trace a part of the model that has none"
    )


def reason(error: BaseException) -> str:
    """An error of torch as one line: its first sentence, without its log addresses and advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = next((line for line in lines if not line.startswith(("from user code", "#", "The following"))), "")
    return f"{type(error).__name__}: {first[:300]}".rstrip(".") if first else type(error).__name__


def frames(error: BaseException) -> Iterator[tuple[Any, int]]:
    """Frames of the error and of what caused it, innermost cause last."""
    chain: BaseException | None = error
    while chain is not None:
        yield from traceback.walk_tb(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__


def user_line(error: BaseException) -> str:
    """``file.py:line`` of the innermost frame outside torch, splitfx and generated code."""
    place = ""
    for frame, line in frames(error):
        name = frame.f_code.co_filename
        if not name.startswith(("<", *foreign_folders())) and not any(
            f"{word}." in name or f"{word}/" in name for word in _NOT_OURS
        ):
            place = f"{name}:{line}"
    return place


def innermost_module(model: nn.Module, copies: list[nn.Module | None], error: BaseException) -> str:
    """The user's path and class of the innermost module whose forward was running."""
    paths = {id(m): path for root in (*copies, model) if root is not None for path, m in root.named_modules()}
    innermost: Any = None
    for frame, _ in frames(error):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (id(owner) in paths or frame.f_code.co_name == "forward"):
            innermost = owner
    if innermost is None or isinstance(innermost, fx.GraphModule):
        return ""
    path = paths.get(id(innermost))
    return type(innermost).__name__ if path is None else f"{path or 'the model itself'} ({type(innermost).__name__})"
