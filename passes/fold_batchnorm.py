"""FoldBatchNorm: a batch norm in eval mode becomes part of the conv or linear layer in front of it.

The norm alone reads a conv, transposed conv or linear layer that is called once and holds its own weight:
scale and shift go into weight and bias, in float64. Everything else stays, with the reason in a note:
a norm that uses batch statistics in eval mode too, one that is called again, one behind anything without a
weight (a sum, a concat, the model's input; folding forward into the next conv is not exact where that conv
pads), a layer with other readers, other calls, a tied or computed weight.

Promise EQUAL, for a model in eval mode. The result has no norm left to train where one was folded, and a state_dict of
the model names keys that it lacks (torch lists them): load weights into the model, then fold.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from splitfx.analysis import Facts
from splitfx.analysis.shapes import shape
from splitfx.compiler.protocol import Note, Outcome, Pass, Promise
from splitfx.ir.editing import bypass
from splitfx.ir.graph import attribute, layer, module_of
from splitfx.ir.ops import Channel, op, op_name


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold every batch norm that can be folded exactly into the conv or linear layer before it.

    A model in train mode is an `UnsupportedError` of the pipeline: there a batch norm is no fixed map.
    """

    name: ClassVar[str] = "fold_batchnorm"
    promise: ClassVar[Promise] = Promise.EQUAL
    needs_eval: ClassVar[bool] = True

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        owners = _owners(graph)
        notes = []
        for node in [n for n in graph.graph.nodes if op_name(n) == "batch_norm"]:
            why = refusal(node, facts, owners)
            if why:
                notes.append(Note(layer(node), f"not folded: {why}", "declined"))
                continue
            before = node.args[0]
            _fold(module_of(before), module_of(node))
            bypass(graph, node)
            notes.append(Note(layer(node), f"folded into {layer(before)}"))
        if not notes:
            notes.append(Note("model", "has no batch norm: nothing to fold", "info"))
        return Outcome(tuple(notes))


def refusal(node: fx.Node, facts: Facts, owners: Counter[int]) -> str:
    """Why a batch norm node cannot be folded exactly; empty where it can."""
    norm, before = module_of(node), node.args[0]
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or not isinstance(before, fx.Node):
        return "its statistics or parameters are computed by the model"
    if norm.running_mean is None or norm.running_var is None:
        return "it keeps no running statistics, so it uses those of the batch in eval mode too"
    if owners[id(norm)] > 1:
        return f"the model calls it {owners[id(norm)]} times"
    if op(before).channel is not Channel.MIXES:
        what = "an input of the model" if before.op == "placeholder" else op_name(before) or before.name
        return f"it reads {what}, which has no weight to fold into"
    module = module_of(before)
    if module is None:
        return f"the weight of {layer(before)} is computed by the model"
    others = [layer(n) for n in before.users if n is not node]
    if others:
        return f"{layer(before)} is also read by {', '.join(others)}"
    if owners[id(module)] > 1:
        return f"the model calls {layer(before)} {owners[id(module)]} times"
    if any(owners[id(p)] > 1 for p in module.parameters()):
        return f"{layer(before)} shares its weight with another layer"
    if isinstance(module, nn.Linear) and len(shape(facts.shapes[before])) != 2:
        return f"it does not normalise the features of {layer(before)}"
    return ""


def _owners(graph: fx.GraphModule) -> Counter[int]:
    """How many calls read each module, and how many modules or values of the graph hold each parameter."""
    owners: Counter[int] = Counter()
    modules: dict[int, nn.Module] = {}
    values: set[str] = set()
    for node in graph.graph.nodes:
        module = module_of(node)
        if module is not None:
            owners[id(module)] += 1
            modules[id(module)] = module
        if node.op == "get_attr":
            values.add(str(node.target))
    owners.update(id(p) for m in modules.values() for p in m.parameters())
    owners.update(id(attribute(graph, path)) for path in values)
    return owners


def _fold(module: Any, norm: Any) -> None:
    """weight * scale, (bias - mean) * scale + shift; in place, so that a second name follows."""
    weight: torch.Tensor = module.weight
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.detach().double()
    shift = torch.zeros_like(scale) if norm.bias is None else norm.bias.detach().double()
    bias = torch.zeros_like(scale) if module.bias is None else module.bias.detach().double()
    with torch.no_grad():
        weight.copy_(weight.double() * _per_output(module, scale))
        bias = (bias - norm.running_mean.double()) * scale + shift
        if module.bias is None:
            module.bias = nn.Parameter(bias.to(weight.dtype), weight.requires_grad)
        else:
            module.bias.copy_(bias)


def _per_output(module: Any, scale: torch.Tensor) -> torch.Tensor:
    """``scale`` [out] shaped to multiply the weight; transposed convs hold that as [in, out/groups, ...]."""
    tail = [1] * (module.weight.dim() - 2)
    if not getattr(module, "transposed", False):
        return scale.reshape(-1, 1, *tail)
    per_group = scale.reshape(module.groups, -1).repeat_interleave(module.in_channels // module.groups, 0)
    return per_group.reshape(*per_group.shape, *tail)
