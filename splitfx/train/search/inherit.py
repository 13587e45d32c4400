"""Trained weights of one split for another that divides one block more.

Group is a function of the dense model, so what was trained is brought to where Group finds it: layers that are not
divided yet go into the dense model before it is split anew; everything in front of the last fusion, which both splits
divide alike, is copied behind it. A fusion that the new split widens is at first a selection of channels: it becomes
the trained fusion followed by that selection.
"""

from __future__ import annotations

import torch
from torch import fx, nn

from splitfx.compiler import transform as api
from splitfx.compiler.plan import Plan
from splitfx.compiler.protocol import Pass
from splitfx.errors import TrainingError
from splitfx.ir.graph import copy_graph, info
from splitfx.ir.ops import op


def extended(dense: fx.GraphModule, trained: fx.GraphModule | None, step: Pass, verify: bool = True) -> fx.GraphModule:
    """``dense`` split by ``step`` (a Group with a fusion), with the weights of ``trained``.

    ``trained`` is ``dense`` split by the same options with the same factors up to some block and 1 from there on, or
    None. Raises `TrainingError` where it is not.
    """
    if trained is None:
        return api.transform(dense, Plan([step]), verify=verify)
    start = copy_graph(dense)
    held = trained.state_dict()
    last = _last_fusion(trained)
    fixed = _owned_before(trained, last)
    own = start.state_dict()
    start.load_state_dict({k: t for k, t in held.items() if k in own and t.shape == own[k].shape}, strict=False)
    split = api.transform(start, Plan([step]), verify=verify)
    fresh = split.state_dict()
    lost = [key for key in fixed if key not in fresh]
    if lost:
        raise TrainingError(f"the trained split is of another plan: {lost[0]} is not in the new one")
    with torch.no_grad():
        for key in fixed:
            if fresh[key].shape == held[key].shape:
                fresh[key].copy_(held[key])
            elif last is not None and key.rpartition(".")[0] == last:
                continue
            else:
                raise TrainingError(
                    f"the trained split is of another plan: {key} is {list(held[key].shape)} there, "
                    f"{list(fresh[key].shape)} here"
                )
        if last is not None and fresh[f"{last}.weight"].shape != held[f"{last}.weight"].shape:
            _selected(split.get_submodule(last), trained.get_submodule(last))
    return split


def fusions(split: fx.GraphModule) -> list[str]:
    """The paths of a split's fusion layers, in order: those that its own record says were made."""
    made = {note.where for step in info(split).steps if step.name == "group" for note in step.notes}
    return [
        str(n.target)
        for n in split.graph.nodes
        if n.op == "call_module" and str(n.target) in made and str(n.target).startswith("fusion")
    ]


def _last_fusion(split: fx.GraphModule) -> str | None:
    found = fusions(split)
    return found[-1] if found else None


def _owned_before(split: fx.GraphModule, last: str | None) -> list[str]:
    """state_dict keys of what the last fusion depends on, and its own; they are divided already."""
    if last is None:
        return []
    waiting = [n for n in split.graph.nodes if n.op == "call_module" and n.target == last]
    seen = set(waiting)
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand not in seen:
                seen.add(operand)
                waiting.append(operand)
    paths = {str(n.target) for n in seen if n.op in ("call_module", "get_attr")}
    return [k for k in split.state_dict() if k in paths or any(k.startswith(f"{path}.") for path in paths)]


def _selected(fusion: nn.Module, trained: nn.Module) -> None:
    """The new fusion as the trained one with its output channels selected: W = S·W_trained, b = S·b_trained."""
    chosen: torch.Tensor = fusion.weight.flatten(1).clone()  # type: ignore[operator, union-attr, assignment]
    weight: torch.Tensor = trained.weight  # type: ignore[assignment]
    fusion.weight.copy_((chosen @ weight.flatten(1)).view_as(fusion.weight))  # type: ignore[operator, union-attr, arg-type]
    fusion.bias.copy_(chosen @ trained.bias)  # type: ignore[operator, union-attr]


def kept_weight(dense: fx.GraphModule, split: fx.GraphModule) -> float:
    """The share of the weight energy of all convs that a split keeps (fusions not counted); no accuracy is implied."""
    made = set(fusions(split))

    def total(graph: fx.GraphModule) -> float:
        paths = {str(n.target) for n in graph.graph.nodes if n.op == "call_module" and op(n).convolves}
        return sum(float(graph.get_submodule(p).weight.detach().double().square().sum()) for p in paths - made)  # type: ignore[union-attr, operator]

    return total(split) / max(total(dense), 1e-300)
