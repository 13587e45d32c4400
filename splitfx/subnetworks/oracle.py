"""The oracle of RESHAPE: every model of a graph with sub-models against a reference made without the pass.

The base model must compute what the graph before the pass did. For each sub-model the graph *before the pass* is
interpreted in float64, node by node, with the step-down's value put in the place of the cut's: that is the reference,
and neither the entry nor the making of sub-models takes part in it. The step-down must give the sizes of the cut, and
what is detached must hold the very tensors of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from splitfx.analysis.oracle import TOLERANCE, Exact, random_flat, require_equal, run_exact
from splitfx.errors import VerificationError
from splitfx.ground.difference import relative_error
from splitfx.ground.exclusive import reseed
from splitfx.ir.graph import by_path, layer
from splitfx.ir.modes import in_eval
from splitfx.ir.ops import is_size
from splitfx.ir.walks import descendants
from splitfx.subnetworks.entry import Entry, entries
from splitfx.subnetworks.model import SubNetworksGraph


def require_models(name: str, before: fx.GraphModule, after: fx.GraphModule, small: bool = False) -> float:
    """The largest relative difference of any model's outputs. Raises `VerificationError`."""
    worst = require_equal(name, before, after)
    old = {str(node.target) for node, _ in entries(before)}
    assert isinstance(after, SubNetworksGraph)
    for index, (node, entry) in enumerate(entries(after)):
        if str(node.target) in old:
            continue
        made = after.detach(index)
        _require_shared(name, after, made, entry)
        worst = max(worst, _difference(name, before, node, entry, made))
    return worst


def _difference(name: str, before: fx.GraphModule, node: fx.Node, entry: Entry, made: fx.GraphModule) -> float:
    inputs = random_flat(before, entry.number, small=False)
    cut = _origin(before, node)
    _require_all(name, before, cut, entry)
    wanted = fed(before, cut, entry, inputs)
    found = run_exact(made, inputs)
    worst = max((_off(name, entry, a, b) for a, b in zip(wanted, found, strict=True)), default=0.0)
    if not worst <= TOLERANCE:
        raise VerificationError(
            f"pass '{name}' broke its promise: sub{entry.number} differs from the model's own layers fed by its "
            f"step-down by {worst:.1e} of its largest value in float64. This is a fault in the pass; please report it"
        )
    return worst


def _off(name: str, entry: Entry, wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The difference of two tensors relative to the largest value that was wanted."""
    if wanted.shape != found.shape:
        what = f"{list(found.shape)} instead of {list(wanted.shape)}"
        raise VerificationError(f"pass '{name}' broke its promise: sub{entry.number} returns {what}")
    return relative_error(found, wanted)


def _origin(before: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node of the graph before the pass whose value the entry hands on."""
    operand = node.all_input_nodes[0]
    while isinstance(_module(operand), Entry) and operand.name not in {n.name for n in before.graph.nodes}:
        operand = operand.all_input_nodes[0]
    found = next((n for n in before.graph.nodes if n.name == operand.name), None)
    if found is None:
        raise VerificationError(f"the entry at {node.target} reads {operand.name}, which the model does not have")
    return found


def _require_all(name: str, before: fx.GraphModule, cut: fx.Node, entry: Entry) -> None:
    """Nothing but the cut's tensor reaches the output from the image: no way leads around it."""
    inputs = [n for n in before.graph.nodes if n.op == "placeholder" and n is not cut]
    if any(n.op == "output" for n in descendants(inputs, lambda n: n is not cut and not is_size(n))):
        raise VerificationError(
            f"pass '{name}' broke its promise: sub{entry.number} enters at {layer(cut)}, and the image reaches the "
            "output around it"
        )


def _module(node: fx.Node) -> Any:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if node.op == "call_module" and owner is not None else None


def fed(before: fx.GraphModule, cut: fx.Node, entry: Entry, inputs: list[Any]) -> list[torch.Tensor]:
    """The reference: the outputs of ``before`` in float64 when the step-down's value stands at the cut."""
    images = [n for n in before.graph.nodes if n.op == "placeholder"]
    image = inputs[entry.reads]

    class Fed(Exact):
        def run_node(self, n: fx.Node) -> Any:
            if n is cut:
                stepped = _stepped(entry, image)
                own = super().run_node(n)  # what the model has there, for its sizes alone
                if stepped.shape != own.shape:
                    raise VerificationError(
                        f"the step-down of sub{entry.number} gives {list(stepped.shape)}, the cut {layer(n)} has "
                        f"{list(own.shape)}"
                    )
                return stepped
            return super().run_node(n)

        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            own = entry.private.get(str(target))
            if own is None:
                return super().call_module(target, args, kwargs)
            return _in_double(entry.norms[own], args)

    assert len(images) == len(inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        reseed(0)
        given = [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]
        found = Fed(before).run(*given, enable_io_processing=False)
    return [v for v in pytree.tree_leaves(found) if isinstance(v, torch.Tensor)]


def _stepped(entry: Entry, image: torch.Tensor) -> torch.Tensor:
    return Exact(entry.step_down).run(image.clone(), enable_io_processing=False)


def _in_double(module: torch.nn.Module, args: Any) -> Any:
    held = {n: t.detach().double() if t.is_floating_point() else t for n, t in by_path(module).items()}
    with in_eval(module):
        return torch.func.functional_call(module, held, args)


def _require_shared(name: str, whole: fx.GraphModule, made: fx.GraphModule, entry: Entry) -> None:
    """Every tensor of a detached model is one of the whole, by identity."""
    theirs = {id(t) for ts in (whole.parameters(), whole.buffers()) for t in ts}
    own = [n for ts in (made.named_parameters(), made.named_buffers()) for n, t in ts if id(t) not in theirs]
    held = {str(n.target) for n in whole.graph.nodes if n.op == "get_attr" and not is_size(n)}
    lost = [n for n in own if n not in held]
    if lost:
        raise VerificationError(f"pass '{name}': sub{entry.number} does not share {lost[0]} with the base model")
