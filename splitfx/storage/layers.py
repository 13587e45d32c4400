"""The layers of a stored program, and the tensors that they hold.

Refuses (`ExportError`, `ValueError`): classes that are not in the tables of `splitfx.storage.program`, options of
other types or sizes than theirs, weights of other shapes than a layer's options say.
Promises: layers are made without memory; the tensors are put in afterwards.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx, nn

from splitfx.errors import ExportError, PlanError
from splitfx.ground import names
from splitfx.ir import graph as graphs
from splitfx.storage import stored
from splitfx.storage.operators import LARGEST
from splitfx.storage.program import ENTRY, LAYERS, STOCHASTIC, TILED, TILED_SWITCHES, layer_options
from splitfx.storage.stored import Layer
from splitfx.subnetworks.entry import FORMS, Entry
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.plan.planner import parse_bytes
from splitfx.tiling.plan.replan import HALF, Goal
from splitfx.tiling.run.executor import Tiled

Values = Mapping[str, tuple[str, torch.Tensor]]
Build = Callable[[Any, Values, str], fx.GraphModule]

_SWITCHES = ("bias", "affine", "track_running_stats", "elementwise_affine", "inplace", "sparse", "scale_grad_by_freq",
             "scale_by_keep")  # fmt: skip
_NUMBERS = ("eps", "momentum", "p", "drop_prob", "max_norm", "norm_type", "init")
_WORDS = {"padding_mode": ("zeros", "reflect", "replicate", "circular"), "mode": ("batch", "row"),
          "padding": ("same", "valid")}  # fmt: skip
_WINDOWS = ("kernel_size", "stride", "padding", "dilation", "output_padding")
_WINDOW = 2**16  # rows of a window: see splitfx.storage.operators


def made(path: str, layer: Layer, values: Values, build: Build) -> nn.Module:
    """The layer at a path, with the graph inside it where it holds one; ``build`` makes that."""
    if layer.kind == TILED:
        return _tiled(path, layer, values, build)
    if layer.kind == ENTRY:
        return _entry(path, layer, values, build)
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
    name, options = layer.kind, {key: stored.value(one, {}) for key, one in layer.options.items()}
    wrong = [key for key, one in options.items() if not _fits(key, one)]
    if wrong:
        raise ExportError(f"the stored {name[:80]} at {path} has unusable options: see {', '.join(wrong)[:200]}.")
    if name in STOCHASTIC:
        return _stochastic(path, name, options)
    if name not in LAYERS:
        raise ExportError(f"the stored program has an unknown layer at {path}: {name[:80]}.")
    kind = LAYERS[name]
    allowed = layer_options(kind)
    wrong = [key for key in options if key not in allowed]
    if wrong:
        raise ExportError(
            f"the stored {name} at {path} has options this torch does not know: {', '.join(wrong)[:200]}."
        )
    # No storage yet: the tensors are put in afterwards, and a missing one is noticed by staying on "meta".
    return kind(**options, **({"device": "meta"} if "device" in inspect.signature(kind.__init__).parameters else {}))


def _fits(name: str, one: Any) -> bool:
    """Whether a value can be this option of a layer."""
    if name in _SWITCHES:
        return isinstance(one, bool)
    if name in _NUMBERS:
        return one is None or (isinstance(one, int | float) and not isinstance(one, bool) and abs(one) <= 1e30)
    if isinstance(one, str):
        return one in _WORDS.get(name, ())
    most = _WINDOW if name in _WINDOWS else LARGEST
    sizes = one if isinstance(one, tuple) else (one,)
    return one is None or (len(sizes) <= 32 and all(_count(size, 0) and size <= most for size in sizes))


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


# ---------------------------------------------------------------- layers that hold a graph


def _tiled(path: str, layer: Layer, values: Values, build: Build) -> Tiled:
    """A stage and its schedule. Stages do not nest."""
    if any(inner.nodes or inner.kind in (TILED, ENTRY) for inner in layer.layers.values()):
        raise ExportError(f"the stored program has a graph inside the tiled stage {path}.")
    options = dict(layer.options)
    schedule = _schedule(path, stored.value(options.pop("schedule", None), {}))
    goal = _goal(path, stored.value(options.pop("goal", None), {}))
    unknown = [name for name, value in options.items() if name not in TILED_SWITCHES or not isinstance(value, bool)]
    if unknown:
        raise ExportError(f"the stored tiled stage {path} has unknown options: {', '.join(unknown)[:200]}.")
    found = Tiled(build(layer, _own(values, f"{path}.stage."), "Stage"), schedule, goal)
    for name, value in options.items():
        setattr(found, name, value)
    return found


def _entry(path: str, layer: Layer, values: Values, build: Build) -> Entry:
    """Where a sub-model enters, with its step-down and the norms that are its own."""
    options: dict[str, Any] = dict(layer.options)
    number, reads, form, private = (options.pop(key, None) for key in ("number", "reads", "form", "private"))
    good = _count(number, 0) and _count(reads, 0) and form in FORMS and isinstance(private, dict)
    if options or not good or any(inner.kind == ENTRY for inner in layer.layers.values()):
        raise ExportError(f"the stored entry {path} has options that this splitfx does not know.")
    found = Entry(build(layer, _own(values, f"{path}.step_down."), "StepDown"), number, reads, form)
    for where, name in private.items():
        if not (names.is_path(where) and names.is_name(name) and name in layer.norms):
            raise ValueError(f"an unusable norm of the entry {path}: {str(where)[:80]!r}")
        norm = _plain(f"{path}.norms.{name}", layer.norms[name])
        found.private[where], found.norms[name] = name, norm
        for key, (kind, tensor) in _own(values, f"{path}.norms.{name}.").items():
            installed(norm, key, kind, tensor)
    return found


def _own(values: Values, start: str) -> dict[str, tuple[str, torch.Tensor]]:
    return {key.removeprefix(start): value for key, value in values.items() if key.startswith(start)}


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
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= LARGEST


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
        return isinstance(value, str) and len(value) <= 100 and parse_bytes(value) > 0
    except PlanError:
        return False
