"""Layers as data: the classes that canonical graphs call, by name, and the options that make one again."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from splitfx.ir.ops import families  # noqa: F401 - which fill the table
from splitfx.ir.ops.row import BY_MODULE

LAYERS = {kind.__name__: kind for kind in BY_MODULE if kind is not nn.SyncBatchNorm}  # which runs among processes only
_NOT_OPTIONS = ("self", "args", "kwargs", "device", "dtype", "init", "_weight", "_freeze")


def option_names(kind: type[nn.Module]) -> list[str]:
    """The arguments of a class that are read back from its layers."""
    names = [name for name in inspect.signature(kind.__init__).parameters if name not in _NOT_OPTIONS]
    # BatchNorm and GroupNorm have a bias option in newer torch only; affine already says all that we need.
    return [name for name in names if not (name == "bias" and "affine" in names)]


def options(layer: nn.Module) -> dict[str, Any]:
    """The options of a layer of `LAYERS`, by name."""
    held = {"bias": getattr(layer, "bias", None) is not None}
    return {name: held[name] if name in held else getattr(layer, name) for name in option_names(type(layer))}
