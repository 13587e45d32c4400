"""The layers of a stored program, and the tensors that they hold.

Refuses (`ExportError`, `ValueError`): classes that are not in the tables of `splitfx.storage.serialize`, options of
other types or sizes than theirs, weights of other shapes than a layer's options say.
Promises: layers are made without memory; the tensors are put in afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from msgspec import structs
from torch import fx, nn

from splitfx.errors import ExportError, PlanError
from splitfx.ground.files.typed import reason
from splitfx.ir import graph as graphs
from splitfx.ir.ops.layers import LAYERS, option_names
from splitfx.storage import stored, values
from splitfx.storage.operators import LARGEST
from splitfx.storage.serialize import ENTRY, STOCHASTIC, TILED
from splitfx.storage.stored import Layer
from splitfx.subnetworks.entry import Entry
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.plan.replan import Goal
from splitfx.tiling.run.executor import Tiled
from splitfx.tiling.stage.kernel import Keeping

Tensors = Mapping[str, tuple[str, torch.Tensor]]  # path -> (kind, tensor)
Build = Callable[[Any, Tensors, str], fx.GraphModule]
T = TypeVar("T")

_SWITCHES = ("bias", "affine", "track_running_stats", "elementwise_affine", "inplace", "sparse", "scale_grad_by_freq",
             "scale_by_keep")  # fmt: skip
_NUMBERS = ("eps", "momentum", "p", "drop_prob", "max_norm", "norm_type", "init")
_WORDS = {"padding_mode": ("zeros", "reflect", "replicate", "circular"), "mode": ("batch", "row"),
          "padding": ("same", "valid")}  # fmt: skip
_WINDOWS = ("kernel_size", "stride", "padding", "dilation", "output_padding")
_WINDOW = 2**16  # rows of a window: see splitfx.storage.operators


def made(path: str, layer: Layer, tensors: Tensors, build: Build) -> nn.Module:
    """The layer at a path, with the graph inside it where it holds one; ``build`` makes that."""
    if layer.kind == TILED:
        return _tiled(path, layer, tensors, build)
    if layer.kind == ENTRY:
        return _entry(path, layer, tensors, build)
    if layer.nodes or layer.layers or layer.norms:
        raise ValueError(f"a graph within {path}, a {layer.kind[:80]}")
    return _plain(path, layer)


def installed(root: nn.Module, path: str, kind: str, tensor: torch.Tensor) -> None:
    """Put a tensor in its place. Raises `ExportError` where the layer there is of another shape."""
    parent, _, name = path.rpartition(".")
    try:
        owner = root.get_submodule(parent)
    except AttributeError:
        owner = nn.Module()  # no layer there: the tensor is read on its own
    slots: dict[str, Any] = owner._parameters if name in owner._parameters else owner._buffers
    if slots.get(name) is None:
        graphs.set_path(root, path, tensor, persistent=kind == "buffer")
        return
    if tuple(slots[name].shape) != tuple(tensor.shape):
        raise ExportError(f"{path} is {list(tensor.shape)} in the weights, {list(slots[name].shape)} in the program.")
    slots[name] = tensor


def _plain(path: str, layer: Layer) -> nn.Module:
    name, options = layer.kind, {key: values.decode(one, {}) for key, one in layer.options.items()}
    wrong = [key for key, one in options.items() if not _fits(key, one)]
    if wrong:
        raise ExportError(f"the stored {name[:80]} at {path} has unusable options: see {', '.join(wrong)[:200]}.")
    if name in STOCHASTIC:
        return _stochastic(path, name, options)
    if name not in LAYERS:
        raise ExportError(f"the stored program has an unknown layer at {path}: {name[:80]}.")
    kind = LAYERS[name]
    allowed = option_names(kind)
    wrong = [key for key in options if key not in allowed]
    if wrong:
        raise ExportError(
            f"the stored {name} at {path} has options this torch does not know: {', '.join(wrong)[:200]}."
        )
    # No storage yet: the tensors are put in afterwards, and a missing one is noticed by staying on "meta".
    return kind(**options, **({"device": "meta"} if "device" in inspect.signature(kind.__init__).parameters else {}))


def _fits(name: str, value: Any) -> bool:
    """Whether a value can be this option of a layer."""
    if name in _SWITCHES:
        return isinstance(value, bool)
    if name in _NUMBERS:
        return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30)
    if isinstance(value, str):
        return value in _WORDS.get(name, ())
    most = _WINDOW if name in _WINDOWS else LARGEST
    sizes = value if isinstance(value, tuple) else (value,)
    return value is None or (
        len(sizes) <= 32
        and all(isinstance(size, int) and not isinstance(size, bool) and 0 <= size <= most for size in sizes)
    )


def _stochastic(path: str, name: str, options: dict[str, Any]) -> nn.Module:
    kind: Any
    try:
        if name.startswith("torchvision."):
            from torchvision.ops import StochasticDepth as kind
        else:
            from timm.layers.drop import DropPath as kind
    except ImportError:
        package = name.partition(".")[0]
        raise ExportError(
            f"the layer {path} is {package}'s {name.rpartition('.')[2]}; pip install {package}."
        ) from None
    return kind(**{key: options[key] for key in STOCHASTIC[name]})


# ---------------------------------------------------------------- layers that hold a graph


def _tiled(path: str, layer: Layer, tensors: Tensors, build: Build) -> Tiled:
    """A stage and its schedule. Stages do not nest."""
    if any(inner.nodes or inner.kind in (TILED, ENTRY) for inner in layer.layers.values()):
        raise ExportError(f"the stored program has a graph inside the tiled stage {path}.")
    options = _options(f"tiled stage {path}", layer, stored.TiledOptions)
    keeping = Keeping(**structs.asdict(options.schedule.keeping))
    schedule = Schedule(**{**structs.asdict(options.schedule), "keeping": keeping})
    goal = Goal(**structs.asdict(options.goal)) if options.goal is not None else None
    tiled = Tiled(build(layer, _own(tensors, f"{path}.stage."), "Stage"), schedule, goal)
    tiled.checkpoint = options.checkpoint
    return tiled


def _entry(path: str, layer: Layer, tensors: Tensors, build: Build) -> Entry:
    """Where a sub-model enters, with its step-down and the norms that are its own."""
    if any(inner.kind == ENTRY for inner in layer.layers.values()):
        raise ExportError(f"the stored program has an entry inside the entry {path}.")
    options = _options(f"entry {path}", layer, stored.EntryOptions)
    step_down = build(layer, _own(tensors, f"{path}.step_down."), "StepDown")
    entry = Entry(step_down, options.number, options.reads, options.form)
    for where, name in options.private.items():
        if name not in layer.norms:
            raise ValueError(f"the entry {path} has no norm {name}")
        norm = _plain(f"{path}.norms.{name}", layer.norms[name])
        entry.private[where], entry.norms[name] = name, norm
        for key, (kind, tensor) in _own(tensors, f"{path}.norms.{name}.").items():
            installed(norm, key, kind, tensor)
    return entry


def _own(tensors: Tensors, start: str) -> dict[str, tuple[str, torch.Tensor]]:
    return {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}


def _options(what: str, layer: Layer, kind: type[T]) -> T:
    """The options of a layer that holds a graph, as they are stored."""
    try:
        return stored.convert({name: values.decode(plain, {}) for name, plain in layer.options.items()}, kind)
    except (ValueError, PlanError) as problem:
        raise ExportError(f"the stored {what} has unusable options: {reason(problem)}.") from None
