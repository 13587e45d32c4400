"""A canonical graph as plain data (JSON types), so that it runs again without the class it came from.

Does: writes nodes, layers, tiled stages with their schedules, and pytree structure; `splitfx.storage.deserialize` reads
them. The tables of what may be in a stored program are here, for both.
Refuses: what has no plain form (operators that are not in `splitfx.storage.operators`, names outside the grammar,
subgraphs, layers of the user's own that do more than pass their input on in eval mode): `NoPlainForm`.
Promises: nothing in the data names a file, a module to import or code to run.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.utils import _pytree as pytree

from splitfx.analysis.shapes import shapes
from splitfx.errors import UnsupportedError
from splitfx.ir import graph as graphs
from splitfx.ir import sizes
from splitfx.ir.modes import in_eval
from splitfx.ir.ops import layers
from splitfx.ir.ops.layers import LAYERS
from splitfx.ir.schema import FUNCTION_NAMES
from splitfx.storage import operators, stored, values
from splitfx.storage.values import NoPlainForm
from splitfx.subnetworks.entry import Entry
from splitfx.tiling.run.executor import Tiled

STOCHASTIC = {  # layers of other packages that the canonical graph keeps whole: class -> its options
    "torchvision.ops.stochastic_depth.StochasticDepth": ("p", "mode"),
    "timm.layers.drop.DropPath": ("drop_prob", "scale_by_keep"),
}
TILED = "Tiled"  # a stage with its schedule: a graph within the graph
ENTRY = "Entry"  # where a sub-model enters: its step-down is a graph within the graph


def serialize(gm: fx.GraphModule) -> dict[str, Any]:
    """The graph as JSON types. Weights are not in it. Raises `NoPlainForm`."""
    info = graphs.info(gm)
    codegen = gm.graph._codegen
    tree = None
    if isinstance(codegen, _PyTreeCodeGen):
        around = codegen.pytree_info
        inside, outside = map(values.encode_structure, (around.in_spec, around.out_spec))
        tree = {"args": list(around.orig_args), "in": inside, "out": outside}
    elif type(codegen) is not CodeGen:
        raise NoPlainForm(f"the graph uses {type(codegen).__name__}")
    plain = {
        **_graph(gm),
        "tree": tree,
        "outputs": [values.encode_tensor(tensor) for tensor in _outputs(gm)],
        "info": {
            "inputs": [values.encode_input(spec) for spec in info.inputs],
            "in_spec": values.encode_structure(info.in_spec),
            "model_class": info.model_class,
            "front_end": info.front_end,
            "sizes": sizes.encode(info.sizes),
            "notes": [asdict(note) for note in info.notes],
            "train_only": list(info.train_only),
            "untouched": list(info.untouched),
            "aliases": dict(info.aliases),
        },
    }
    try:
        stored.decoded(plain)
    except ValueError as reason:  # what could not be read back
        raise NoPlainForm(f"the graph has {reason}") from None
    return plain


def _outputs(gm: fx.GraphModule) -> list[torch.Tensor]:
    """What the graph gives, as fake tensors. The model may have been converted to another type since it was traced;
    then its inputs are of that type."""
    problem: UnsupportedError | None = None
    for inputs in (graphs.info(gm).inputs, graphs.specs_as_now(gm)):
        try:
            outputs = shapes(gm, inputs)[graphs.output_node(gm)]
        except UnsupportedError as error:
            problem = problem or error
            continue
        return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    raise NoPlainForm(f"the graph does not run on what it was traced with ({problem})")


def _graph(gm: fx.GraphModule) -> dict[str, Any]:
    called = sorted({str(node.target) for node in gm.graph.nodes if node.op == "call_module"})
    return {
        "nodes": [_node(node) for node in gm.graph.nodes],
        "layers": {path: _layer(path, gm.get_submodule(path)) for path in called},
    }


def _node(node: fx.Node) -> dict[str, Any]:
    target = _function_name(node) if node.op == "call_function" else str(node.target)
    if node.op == "call_method":
        raise NoPlainForm(f"{graphs.layer(node)} calls the method {target}")
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": [values.encode(value) for value in node.args],
        "kwargs": {name: values.encode(value) for name, value in node.kwargs.items()},
        "layer": node.meta.get("layer", ""),
    }


def _function_name(node: fx.Node) -> str:
    target: Any = node.target
    refused = operators.refusal(target)
    if refused:
        raise NoPlainForm(f"{graphs.layer(node)} runs {target}, which {refused}")
    return FUNCTION_NAMES.get(target, str(target))


def _layer(path: str, module: nn.Module) -> dict[str, Any]:
    kind = type(module)
    if LAYERS.get(kind.__name__) is kind:
        return {
            "class": kind.__name__,
            "options": {name: values.encode(value) for name, value in layers.options(module).items()},
        }
    if isinstance(module, Tiled) and kind is Tiled:
        goal = module.goal if module.goal is None else asdict(module.goal)
        options = {"schedule": asdict(module.schedule), "goal": goal, "checkpoint": module.checkpoint}
        return {
            "class": TILED,
            "options": {name: values.encode(value) for name, value in options.items()},
            **_graph(module.stage),
        }
    if kind is Entry:
        assert isinstance(module, Entry)
        own = {"number": module.number, "reads": module.reads, "form": module.form, "private": dict(module.private)}
        options = {name: values.encode(value) for name, value in own.items()}
        norms = {name: _layer(f"{path}.norms.{name}", norm) for name, norm in module.norms.items()}
        return {"class": ENTRY, "options": options, "norms": norms, **_graph(module.step_down)}
    full = f"{kind.__module__}.{kind.__qualname__}"
    if full in STOCHASTIC:
        return {"class": full, "options": {name: getattr(module, name) for name in STOCHASTIC[full]}}
    if _passes_through(module):
        return {"class": "Identity", "options": {}, "instead_of": kind.__name__}
    raise NoPlainForm(f"{path} is a {kind.__name__}, which exists only in its own code")


def _passes_through(module: nn.Module) -> bool:
    """Whether a parameterless layer of the user's hands its input on in eval mode, as DropPath does."""
    probe = torch.randn(2, 3, 4, 4)
    try:
        with in_eval(module):
            return bool(torch.equal(module(probe), probe))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False  # it wants another input; then it is more than a pass-through
