"""A graph from the plain data that `splitfx.program` wrote and a dict of tensors.

Does: builds layers, nodes, signature and record; installs the tensors.
Refuses: everything that is not in the closed tables of `splitfx.program`, and damaged data (`ExportError`).
Promises: never imports, evaluates or unpickles what a file names; every name that ends up in generated code
is checked first. `torch.export.load` does not promise that (it evaluates guards and size expressions and
falls back to full unpickling), which is why stored programs are not its archives.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections import namedtuple
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from splitfx import graph as graphs
from splitfx.errors import ExportError, PlanError
from splitfx.program import ENTRY, FUNCTIONS, LAYERS, NAMESPACES, STOCHASTIC, TILED, TILED_SWITCHES, layer_options
from splitfx.protocol import Note
from splitfx.subnetworks.entry import FORMS, Entry
from splitfx.subnetworks.model import dress
from splitfx.tiling.executor import Tiled
from splitfx.tiling.instructions import Schedule
from splitfx.tiling.planner import parse_bytes
from splitfx.tiling.replan import HALF, Goal

Values = Mapping[str, tuple[str, torch.Tensor]]

_PATH = re.compile(r"[\w \-+:@#/]+(\.[\w \-+:@#/]+)*")  # no quotes: fx writes these into generated code
_OPERATOR = re.compile(r"(\w+)\.(\w+)\.(\w+)")


def from_plain(plain: Mapping[str, Any], values: Values) -> fx.GraphModule:
    """The graph of `to_plain` with `values`: path -> (kind, tensor), kind one of parameter, buffer, constant.

    Parameters must come as nn.Parameter, one object per tied group. Raises `ExportError` for anything not
    known here.
    """
    try:
        return _build(plain, values)
    except ExportError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        IndexError,
        AttributeError,
        RuntimeError,
        AssertionError,
        RecursionError,
    ) as error:
        raise ExportError(f"the stored program is damaged ({type(error).__name__}: {error}).") from error


def _build(plain: Mapping[str, Any], values: Values) -> fx.GraphModule:
    gm = _graph(plain, values, _identifier(plain["info"]["model_class"]))
    info = gm.meta[graphs.INFO] = _make_info(plain["info"])
    for alias, path in info.aliases.items():
        _checked_path(alias)
        if not isinstance(graphs.resolve(gm, _checked_path(path)), nn.Module | torch.Tensor):
            raise ExportError(f"the stored program has an alias of something that is no layer or tensor: {path}.")
    graphs.restore_aliases(gm)
    gm._register_deepcopy_hook(graphs.restore_aliases)
    return dress(gm.eval())


def _graph(plain: Mapping[str, Any], values: Values, name: str) -> fx.GraphModule:
    """Layers and nodes, with the tensors at their places; a tiled stage is a graph within this one."""
    root = nn.Module()
    layers: Mapping[str, Any] = plain["layers"]
    tiled = tuple(f"{path}." for path, layer in layers.items() if layer["class"] in _WITHIN)
    for path, layer in sorted(layers.items(), key=lambda item: item[0].count(".")):
        make = _WITHIN.get(layer["class"])
        module = make(path, layer, values) if make is not None else _make_layer(path, layer)
        graphs.set_path(root, _checked_path(path), module)
    for path, (kind, tensor) in values.items():
        if not path.startswith(tiled):
            _install(root, _checked_path(path), kind, tensor)
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for one in plain["nodes"]:
        known = {"call_module": layers, "get_attr": values}.get(one["op"])
        if known is not None and one["target"] not in known:
            raise ExportError(f"the stored program has no layer or tensor {one['target']!r}.")
        nodes[one["name"]] = _make_node(graph, one, nodes)
    if plain.get("tree") is not None:
        graph.set_codegen(_codegen(plain["tree"]))
    gm = fx.GraphModule(root, graph, name)
    for path, (kind, _) in values.items():
        if kind == "constant":  # fx registers every buffer it copies as persistent
            parent, _, last = path.rpartition(".")
            gm.get_submodule(parent)._non_persistent_buffers_set.add(last)
    gm.graph.lint()
    return gm


def _tiled(path: str, layer: Mapping[str, Any], values: Values) -> Tiled:
    """A stage and its schedule. Stages do not nest."""
    if any(inner["class"] == TILED for inner in layer["layers"].values()):
        raise ExportError(f"the stored program has a tiled stage inside the tiled stage {path}.")
    options = dict(layer["options"])
    schedule = _schedule(path, _read(options.pop("schedule"), {}))
    goal = _goal(path, _read(options.pop("goal", None), {}))
    unknown = [name for name, value in options.items() if name not in TILED_SWITCHES or not isinstance(value, bool)]
    if unknown:
        raise ExportError(f"the stored tiled stage {path} has unknown options: {', '.join(unknown)}.")
    start = f"{path}.stage."
    own = {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}
    found = Tiled(_graph(layer, own, "Stage"), schedule, goal)
    for name, value in options.items():
        setattr(found, name, value)
    return found


def _entry(path: str, layer: Mapping[str, Any], values: Values) -> Entry:
    """Where a sub-model enters, with its step-down and the norms that are its own."""
    options: dict[str, Any] = dict(layer["options"])
    number, reads, form, private = (options.pop(key) for key in ("number", "reads", "form", "private"))
    if options or not _count(number, 0) or not _count(reads, 0) or form not in FORMS or not isinstance(private, dict):
        raise ExportError(f"the stored entry {path} has options that this splitfx does not know.")
    start = f"{path}.step_down."
    own = {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}
    found = Entry(_graph(layer, own, "StepDown"), number, reads, form)
    for where, name in private.items():
        norm = _make_layer(f"{path}.norms.{name}", layer["norms"][name])
        found.private[_checked_path(where)] = _identifier(name)
        found.norms[name] = norm
        for key, (kind, tensor) in values.items():
            if key.startswith(f"{path}.norms.{name}."):
                _install(norm, key.rpartition(".")[2], kind, tensor)
    return found


_WITHIN = {TILED: _tiled, ENTRY: _entry}  # layers that hold a graph of their own


def _schedule(path: str, given: Any) -> Schedule:
    """The stored schedule, if it is one: whole numbers, and a number of bytes."""
    fits = {
        "rows": lambda value: _count(value, 0),
        "every": lambda value: _counts(value, 1),
        "tiles": lambda value: _counts(value, 1) and len(value) == 2,
        "recompute": lambda value: (isinstance(value, float) and value >= 0) or _count(value, 0),
    }
    known = {one.name for one in dataclasses.fields(Schedule)} & set(fits)
    if not isinstance(given, dict) or not set(given) <= known:
        raise ExportError(f"the stored tiled stage {path} has a schedule that this splitfx does not know.")
    wrong = [name for name, value in given.items() if not fits[name](value)]
    if wrong:
        raise ExportError(f"the stored tiled stage {path} has an unusable schedule: see {', '.join(wrong)}.")
    return Schedule(**given)


def _count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _counts(value: Any, least: int) -> bool:
    return isinstance(value, tuple) and all(_count(one, least) for one in value)


def _goal(path: str, given: Any) -> Goal | None:
    """What the stage was planned for, if that was stored and is one."""
    if given is None:
        return None
    fits = {
        "budget": lambda value: value in (HALF, "least") or _is_budget(value),
        "mode": lambda value: value in ("auto", "stream", "grid"),
        "sizes": lambda value: isinstance(value, tuple) and all(_counts(one, 0) for one in value),
        "outside": lambda value: _count(value, 0),
    }
    if not isinstance(given, dict) or set(given) != set(fits):
        raise ExportError(f"the stored tiled stage {path} has a budget that this splitfx does not know.")
    wrong = [name for name, value in given.items() if not fits[name](value)]
    if wrong:
        raise ExportError(f"the stored tiled stage {path} has an unusable budget: see {', '.join(wrong)}.")
    return Goal(**given)


def _is_budget(value: Any) -> bool:
    try:
        return isinstance(value, str) and parse_bytes(value) > 0
    except PlanError:
        return False


def _make_layer(path: str, layer: Mapping[str, Any]) -> nn.Module:
    name, options = layer["class"], {key: _read(one, {}) for key, one in layer["options"].items()}
    if name in STOCHASTIC:
        return _stochastic(path, name, options)
    if name not in LAYERS:
        raise ExportError(f"the stored program has an unknown layer at {path}: {name}.")
    kind = LAYERS[name]
    allowed = layer_options(kind)
    wrong = [key for key in options if key not in allowed]
    if wrong:
        raise ExportError(f"the stored {name} at {path} has options this torch does not know: {', '.join(wrong)}.")
    # No storage yet: the tensors are put in afterwards, and a missing one is noticed by staying on "meta".
    return kind(**options, **({"device": "meta"} if "device" in inspect.signature(kind.__init__).parameters else {}))


def _stochastic(path: str, name: str, options: dict[str, Any]) -> nn.Module:
    try:
        if name.startswith("torchvision."):
            from torchvision.ops import StochasticDepth as kind
        else:
            from timm.layers import DropPath as kind  # type: ignore[no-redef]
    except ImportError:
        package = name.partition(".")[0]
        raise ExportError(
            f"the layer {path} is {package}'s {name.rpartition('.')[2]}; pip install {package}."
        ) from None
    return kind(**{key: options[key] for key in STOCHASTIC[name]})


def _install(root: nn.Module, path: str, kind: str, tensor: torch.Tensor) -> None:
    parent, _, name = path.rpartition(".")
    try:
        owner = root.get_submodule(parent)
    except AttributeError:
        owner = nn.Module()  # no layer there: the tensor is read on its own
    slots: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers  # type: ignore[assignment]
    if slots.get(name) is None:
        graphs.set_path(root, path, tensor, persistent=kind == "buffer")
        return
    if tuple(slots[name].shape) != tuple(tensor.shape):
        raise ExportError(f"{path} is {list(tensor.shape)} in the weights, {list(slots[name].shape)} in the program.")
    slots[name] = tensor


def _make_node(graph: fx.Graph, plain: Mapping[str, Any], nodes: Mapping[str, fx.Node]) -> fx.Node:
    op, name, target = plain["op"], _identifier(plain["name"]), plain["target"]
    if name in nodes:
        raise ExportError(f"the stored program has two nodes named {name}.")
    args = tuple(_read(one, nodes) for one in plain["args"])
    kwargs = {_identifier(key): _read(one, nodes) for key, one in plain["kwargs"].items()}
    if op == "call_function":
        target = _function(target)
    elif op in ("call_module", "get_attr"):
        target = _checked_path(target)
    elif op == "placeholder":
        target = _identifier(target)
    elif op != "output" or target != "output":
        raise ExportError(f"the stored program has an unknown kind of node: {op} {target}.")
    node = graph.create_node(op, target, args, kwargs, name=name)
    node.meta = {"layer": str(plain["layer"]), "source": ""}
    return node


def _function(name: str) -> Any:
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = _OPERATOR.fullmatch(name)
    if parts is None or parts[1] not in NAMESPACES:
        raise ExportError(f"the stored program runs '{name}', which is not an operator of torch or torchvision.")
    if parts[1] == "torchvision":
        import torchvision  # noqa: F401 - registers its operators
    packet = getattr(getattr(torch.ops, parts[1]), parts[2], None)
    found = getattr(packet, parts[3], None)
    if not isinstance(found, torch._ops.OpOverload):
        raise ExportError(f"this torch has no operator '{name}'; load the folder with the torch that saved it.")
    takes = {argument.name for argument in found._schema.arguments}
    if parts[2] == "save" or "filename" in takes:  # aten::save and aten::from_file reach the file system
        raise ExportError(f"the stored program runs '{name}', which reads or writes files.")
    return found


def _read(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    """The inverse of `_value`."""
    if isinstance(value, list):
        return [_read(one, nodes) for one in value]
    if not isinstance(value, dict):
        return value
    ((word, held),) = value.items()
    if word in ("dtype", "memory_format", "layout"):
        found = getattr(torch, held) if str(held).isidentifier() else None
        if not isinstance(found, torch.dtype | torch.memory_format | torch.layout):
            raise ExportError(f"the stored program has an unknown {word}: {held}.")
        return found
    readers = {
        "node": lambda: nodes[held],
        "tuple": lambda: tuple(_read(one, nodes) for one in held),
        "dict": lambda: {_read(key, nodes): _read(one, nodes) for key, one in held},
        "slice": lambda: slice(*(_read(one, nodes) for one in held)),
        "float": lambda: float(held),
        "complex": lambda: complex(*held),
        "ellipsis": lambda: Ellipsis,
        "device": lambda: torch.device("cpu"),  # the loaded program lives where its weights are: on the CPU
    }
    if word not in readers:
        raise ExportError(f"the stored program has an unknown value: {word}.")
    return readers[word]()


def _codegen(tree: Mapping[str, Any]) -> _PyTreeCodeGen:
    names = [_identifier(name) for name in tree["args"]]
    return _PyTreeCodeGen(_PyTreeInfo(names, _structure(tree["in"]), _structure(tree["out"])))


def _structure(plain: Any) -> Any:
    return None if plain is None else pytree.tree_flatten(_tree(plain))[1]


def _tree(plain: Any) -> Any:
    if plain == "*":
        return 0
    ((word, held),) = plain.items()
    if word == "dict":
        return {key: _tree(one) for key, one in held}
    if word == "namedtuple":
        name, names, children = held
        return namedtuple(_identifier(name), [_identifier(one) for one in names])(*map(_tree, children))  # type: ignore[misc]
    if word not in ("tuple", "list"):
        raise ExportError(f"the stored program has an unknown container: {word}.")
    return tuple(map(_tree, held)) if word == "tuple" else [_tree(one) for one in held]


def _make_info(plain: Mapping[str, Any]) -> graphs.TraceInfo:
    def one_input(value: Any) -> Any:
        if not (isinstance(value, dict) and "tensor" in value):
            return _read(value, {})
        held = value["tensor"]
        return graphs.TensorSpec(tuple(held["shape"]), _read(held["dtype"], {}), "cpu", held["high"])

    return graphs.TraceInfo(
        tuple(one_input(value) for value in plain["inputs"]),
        _structure(plain["in_spec"]),
        plain["model_class"],
        plain["front_end"],
        plain["dynamic"],
        tuple(Note(**note) for note in plain["notes"]),
        tuple(plain["train_only"]),
        tuple(plain["untouched"]),
        dict(plain["aliases"]),
    )


def _identifier(name: Any) -> str:
    if not isinstance(name, str) or not name.isidentifier():
        raise ExportError(f"the stored program has an unusable name: {name!r}.")
    return name


def _checked_path(path: Any) -> str:
    if not isinstance(path, str) or not _PATH.fullmatch(path):
        raise ExportError(f"the stored program has an unusable layer path: {path!r}.")
    return path


def example(plain: Mapping[str, Any], device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Random `(args, kwargs)` in the shapes that the stored graph was traced with, on `device`."""
    info = _make_info(plain["info"])
    generator = torch.Generator().manual_seed(0)
    leaves = [
        one.random(generator, device=device) if isinstance(one, graphs.TensorSpec) else one for one in info.inputs
    ]
    args, kwargs = pytree.tree_unflatten(leaves, info.in_spec)
    return tuple(args), dict(kwargs)
