"""A canonical graph as plain data (JSON types), so that it runs again without the class it came from.

Does: writes nodes, layers, tiled stages with their schedules, and pytree structure; `splitfx.storage.rebuild` reads
them. The tables of what may be in a stored program are here, for both.
Refuses: what has no plain form (operators that are not in `splitfx.storage.operators`, names outside the grammar,
subgraphs, layers of the user's own that do more than pass their input on in eval mode): `NoPlainForm`.
Promises: nothing in the data names a file, a module to import or code to run.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen, _PyTreeCodeGen
from torch.utils import _pytree as pytree

from splitfx.analysis.shapes import shapes
from splitfx.errors import UnsupportedError
from splitfx.ir import graph as graphs
from splitfx.ir import sizes
from splitfx.ir.layers import FunctionalBatchNorm
from splitfx.storage import operators, stored
from splitfx.subnetworks.entry import Entry
from splitfx.tiling.run.executor import Tiled

LAYERS = {
    name: getattr(nn, name)
    for name in (
        *(f"{kind}{n}d" for kind in ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm") for n in (1, 2, 3)),
        "Linear",
        "LayerNorm",
        "GroupNorm",
        "RMSNorm",
        "Embedding",
        "PReLU",
        "Identity",
        "Dropout",
        "Dropout1d",
        "Dropout2d",
        "Dropout3d",
        "AlphaDropout",
        "FeatureAlphaDropout",
    )
}
LAYERS["FunctionalBatchNorm"] = FunctionalBatchNorm
STOCHASTIC = {  # layers of other packages that the canonical graph keeps whole: class -> its options
    "torchvision.ops.stochastic_depth.StochasticDepth": ("p", "mode"),
    "timm.layers.drop.DropPath": ("drop_prob", "scale_by_keep"),
}
TILED = "Tiled"  # a stage with its schedule: a graph within the graph
TILED_SWITCHES = ("checkpoint",)  # what else a tiled stage is told, yes or no
ENTRY = "Entry"  # where a sub-model enters: its step-down is a graph within the graph
_NAMES = {target: name for name, target in operators.FUNCTIONS.items()}


class NoPlainForm(Exception):
    """This graph cannot be written as plain data; the message says what stands in the way."""


def to_plain(gm: fx.GraphModule) -> dict[str, Any]:
    """The graph as JSON types. Weights are not in it. Raises `NoPlainForm`."""
    info = graphs.info(gm)
    codegen = gm.graph._codegen
    tree = None
    if isinstance(codegen, _PyTreeCodeGen):
        known = codegen.pytree_info
        tree = {"args": list(known.orig_args), "in": _spec(known.in_spec), "out": _spec(known.out_spec)}
    elif type(codegen) is not CodeGen:
        raise NoPlainForm(f"the graph uses {type(codegen).__name__}")
    given = _rehearsed(gm)
    plain = {
        **_graph(gm),
        "tree": tree,
        "outputs": [{"shape": [int(n) for n in one.shape], "dtype": plain_value(one.dtype)} for one in given],
        "info": {
            "inputs": [_input(one) for one in info.inputs],
            "in_spec": _spec(info.in_spec),
            "model_class": info.model_class,
            "front_end": info.front_end,
            "sizes": sizes.to_plain(info.sizes),
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


def _rehearsed(gm: fx.GraphModule) -> list[torch.Tensor]:
    """What the graph gives, as fake tensors. The model may have been converted to another type since it was traced;
    then its inputs are of that type."""
    problem: UnsupportedError | None = None
    for inputs in (graphs.info(gm).inputs, graphs.specs_as_now(gm)):
        try:
            given = shapes(gm, inputs)[graphs.output_node(gm)]
        except UnsupportedError as error:
            problem = problem or error
            continue
        return [one for one in pytree.tree_leaves(given) if isinstance(one, torch.Tensor)]
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
    args, kwargs = [plain_value(one) for one in node.args], {key: plain_value(one) for key, one in node.kwargs.items()}
    return {
        "op": node.op,
        "name": node.name,
        "target": target,
        "args": args,
        "kwargs": kwargs,
        "layer": node.meta.get("layer", ""),
    }


def _function_name(node: fx.Node) -> str:
    target: Any = node.target
    refused = operators.refusal(target)
    if refused:
        raise NoPlainForm(f"{graphs.layer(node)} runs {target}, which {refused}")
    return _NAMES[target] if target in _NAMES else str(target)


def _layer(path: str, module: nn.Module) -> dict[str, Any]:
    kind = type(module)
    if LAYERS.get(kind.__name__) is kind:
        return {
            "class": kind.__name__,
            "options": {name: _option(module, name) for name in layer_options(kind)},
        }
    if isinstance(module, Tiled) and kind is Tiled:
        schedule = {one.name: getattr(module.schedule, one.name) for one in fields(module.schedule)}
        switches = {name: bool(getattr(module, name)) for name in TILED_SWITCHES if hasattr(module, name)}
        goal = {} if module.goal is None else {"goal": plain_value(asdict(module.goal))}
        return {
            "class": TILED,
            "options": {"schedule": plain_value(schedule), **goal, **switches},
            **_graph(module.stage),
        }
    if kind is Entry:
        assert isinstance(module, Entry)
        options = {"number": module.number, "reads": module.reads, "form": module.form, "private": dict(module.private)}
        norms = {name: _layer(f"{path}.norms.{name}", norm) for name, norm in module.norms.items()}
        return {"class": ENTRY, "options": options, "norms": norms, **_graph(module.step_down)}
    full = f"{kind.__module__}.{kind.__qualname__}"
    if full in STOCHASTIC:
        return {"class": full, "options": {name: getattr(module, name) for name in STOCHASTIC[full]}}
    if _passes_through(module):
        return {"class": "Identity", "options": {}, "instead_of": kind.__name__}
    raise NoPlainForm(f"{path} is a {kind.__name__}, which exists only in its own code")


def layer_options(kind: type[nn.Module]) -> list[str]:
    left_out = ("self", "args", "kwargs", "device", "dtype", "init", "_weight", "_freeze")
    names = [name for name in inspect.signature(kind.__init__).parameters if name not in left_out]
    # BatchNorm and GroupNorm have a bias option in newer torch only; affine already says all that we need.
    return [name for name in names if not (name == "bias" and "affine" in names)]


def _option(module: nn.Module, name: str) -> Any:
    if name == "bias":
        return getattr(module, "bias", None) is not None
    return plain_value(getattr(module, name))


def _passes_through(module: nn.Module) -> bool:
    """Whether a parameterless layer of the user's hands its input on in eval mode, as DropPath does."""
    was, probe = module.training, torch.randn(2, 3, 4, 4)
    try:
        return bool(torch.equal(module.eval()(probe), probe))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return False  # it wants another input; then it is more than a pass-through
    finally:
        module.train(was)


def plain_value(value: Any) -> Any:
    """Plain values as themselves; everything else as a dict with one key that says what it is."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, tuple):
        return {"tuple": [plain_value(one) for one in value]}
    if isinstance(value, list):
        return [plain_value(one) for one in value]
    if isinstance(value, dict):
        return {"dict": [[plain_value(key), plain_value(one)] for key, one in value.items()]}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [plain_value(value.start), plain_value(value.stop), plain_value(value.step)]}
    if isinstance(value, complex) and math.isfinite(value.real) and math.isfinite(value.imag):
        return {"complex": [value.real, value.imag]}
    if value is Ellipsis:
        return {"ellipsis": 0}
    if isinstance(value, torch.device):
        return {"device": value.type}
    for kind, word in (
        (torch.dtype, "dtype"),
        (torch.memory_format, "memory_format"),
        (torch.layout, "layout"),
    ):
        if isinstance(value, kind):
            return {word: str(value).removeprefix("torch.")}
    raise NoPlainForm(f"a value of type {type(value).__name__} has no plain form")


def _input(spec: Any) -> Any:
    if not isinstance(spec, graphs.TensorSpec):
        return plain_value(spec)
    return {"tensor": {"shape": list(spec.shape), "dtype": plain_value(spec.dtype), "high": spec.high}}


def _spec(spec: Any) -> Any:
    """A pytree structure: "*" for a leaf, else one container; dataclasses are written as dicts."""
    if spec is None:
        return None
    leaves = iter(range(spec.num_leaves))
    plain = _container(pytree.tree_unflatten(range(spec.num_leaves), spec), leaves)
    if next(leaves, None) is not None:
        raise NoPlainForm("an input or output container hides some of its tensors")
    return plain


def _container(tree: Any, leaves: Any) -> Any:
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
