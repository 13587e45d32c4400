"""Train and eval mode: which modules act on it, and which of them tracing keeps whole because they do."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from splitfx.ir.graph import Whole


@contextmanager
def kept_modes(*models: nn.Module) -> Iterator[None]:
    """However the block ends, every module's own flag comes back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def in_eval(*models: nn.Module) -> Iterator[None]:
    """Eval mode within; see `kept_modes`."""
    with kept_modes(*models):
        for model in models:
            model.eval()
        yield


def _reads_training(module: nn.Module) -> bool:
    try:
        return "self.training" in inspect.getsource(type(module).forward)
    except (OSError, TypeError):
        return False  # a forward without source is C code or generated; torch.export looks into it anyway


def is_opaque(module: nn.Module) -> bool:
    """A parameterless leaf that acts on ``self.training`` (DropPath, StochasticDepth): one tensor in, one
    out.
    """
    if isinstance(module, nn.RReLU | Whole):
        return True
    if type(module).__module__.startswith("torch.nn") or next(module.children(), None) is not None:
        return False
    if next(module.parameters(), None) is not None or next(module.buffers(), None) is not None:
        return False
    wanted = [p for p in inspect.signature(type(module).forward).parameters.values() if p.default is p.empty]
    return len(wanted) == 2 and _reads_training(module)


def module_has_mode(module: nn.Module) -> bool:
    """Modules that act on train() and eval()."""
    kinds = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
    return isinstance(module, kinds) or is_opaque(module)


def leaf_paths(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules() if is_opaque(module)}
