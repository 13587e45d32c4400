"""What a model does, call by call, observed on fake tensors: nothing is computed, and nothing of it changes.

A trace shows one path through the user's Python, for one mode and one batch size. Comparing what the model
calls in eval and in train mode, and for a batch of one and of two, shows where that path is not the only one,
so that such differences are reported or refused and never lost in silence.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_READS = {
    "__get__",
    "__set__",
    "size",
    "dim",
    "numel",
    "stride",
    "__len__",
    "is_floating_point",
    "is_contiguous",
}
_TABLES = frozenset(vars(nn.Module()))  # of torch's own, in every module
# What may be called at any size without a size being read: its arguments are tensors and options of the layer alone.
_BLIND_WORDS = """
    conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear batch_norm layer_norm group_norm
    instance_norm relu relu_ relu6 hardtanh hardtanh_ sigmoid sigmoid_ silu gelu hardswish hardsigmoid tanh leaky_relu
    elu selu celu mish softplus prelu clamp clamp_min clamp_max add add_ __add__ __radd__ __iadd__ sub __sub__ __rsub__
    mul mul_ __mul__ __rmul__ __imul__ div __truediv__ neg __neg__ exp sqrt rsqrt square pow __pow__ cat concat flatten
    mean sum amax amin softmax log_softmax permute transpose contiguous dropout dropout1d dropout2d dropout3d
    feature_dropout alpha_dropout max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d pixel_shuffle
    pixel_unshuffle channel_shuffle unsqueeze leaf stage identity float double dim is_floating_point is_contiguous
    __set__
"""
_BLIND = frozenset(_BLIND_WORDS.split())
_POOLS = frozenset(f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3))
_NORMS = (nn.modules.batchnorm._NormBase, nn.modules.instancenorm._InstanceNorm)


@dataclass
class Behaviour:
    """One forward pass.

    ``calls`` counts (layer path, function). ``norms`` says for the id of each running mean whether batch
    statistics were used. ``resized`` are the watched layers that returned another size or type. ``reads_sizes``: the
    model may have read a size of a tensor, or have called something to which sizes are given.
    """

    calls: Counter[tuple[str, str]] = field(default_factory=Counter)
    norms: dict[int, bool] = field(default_factory=dict)
    resized: set[str] = field(default_factory=set)
    reads_sizes: bool = False


def observe(model: nn.Module, args: Any, kwargs: Any, leaves: Iterable[str] = ()) -> Behaviour:
    """Run ``model`` once on fake copies of its inputs and of its own tensors.

    Calls inside ``leaves`` (layer paths) are not counted.
    """
    seen, stack = Behaviour(), [""]
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    fake_of: dict[int, torch.Tensor] = {}

    def fake(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if id(leaf) not in fake_of:
            with fakes:  # far cheaper than converting the tensor, of which only the form matters
                fake_of[id(leaf)] = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
        return fake_of[id(leaf)]

    args, kwargs = pytree.tree_map(fake, (args, kwargs))
    with (
        _swapped(model, fake),
        _watched(model, stack, seen, set(leaves)),
        torch.enable_grad(),
        quiet(),
        fakes,
        _Recorder(seen, stack, {path for path, m in model.named_modules() if isinstance(m, _NORMS)}),
    ):
        model(*args, **kwargs)
    real = {id(value): key for key, value in fake_of.items()}
    seen.norms = {real[key]: value for key, value in seen.norms.items() if key in real}
    return seen


@contextmanager
def _swapped(model: nn.Module, fake: Callable[[Any], Any]) -> Iterator[None]:
    """Within, every tensor that a module holds is its fake, in lists and dicts too; afterwards all attributes, and
    what these contain, are what they were."""
    kept = []
    for module in model.modules():
        own = vars(module)
        for held in (own, own["_parameters"], own["_buffers"]):
            kept.append((held, dict(held)))
            held.update({k: fake(v) for k, v in held.items() if isinstance(v, torch.Tensor)})
        nested = {k: v for k, v in own.items() if type(v) in (list, dict, set) and k not in _TABLES}
        own.update({k: pytree.tree_map(fake, copy.copy(v)) for k, v in nested.items()})
    try:
        yield
    finally:
        for held, before in kept:
            held.clear()
            held.update(before)


def differences(one: Behaviour, other: Behaviour) -> dict[str, list[str]]:
    """Layer path -> functions that one of the two called more often than the other."""
    unequal = (one.calls - other.calls) + (other.calls - one.calls)
    functions: dict[str, list[str]] = {}
    for path, name in sorted(unequal):
        functions.setdefault(path, []).append(name)
    return functions


class _Recorder(TorchFunctionMode):
    def __init__(self, seen: Behaviour, stack: list[str], norms: set[str]) -> None:
        super().__init__()
        self.seen, self.stack, self.norms = seen, stack, norms

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, path = getattr(func, "__name__", str(func)), self.stack[-1]
        self.seen.reads_sizes = self.seen.reads_sizes or not _blind(func, name, args, kwargs)
        counter = path in self.norms and name in ("add_", "add")  # num_batches_tracked, in train mode only
        if name not in _READS and path is not None and not counter:
            self.seen.calls[path, name + _active_dropout(func, name, args, kwargs)] += 1
        if name == "batch_norm":
            return self.norm(func, args, kwargs)
        return func(*args, **kwargs)

    def norm(self, func: Any, args: Any, kwargs: Any) -> torch.Tensor:
        """Note the statistics that are used. The result is like the input: torch takes ten times as long to say so."""
        names = ("input", "running_mean", "running_var", "weight", "bias", "training")
        if func is torch.batch_norm:
            names = ("input", "weight", "bias", "running_mean", "running_var", "training")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if given.get("running_mean") is not None:
            self.seen.norms[id(given["running_mean"])] = bool(given.get("training", False))
        x, weight = given["input"], given.get("weight")
        sized = weight if weight is not None else given.get("running_mean")
        usual = func is F.batch_norm and sized is not None and sized.shape == x.shape[1:2]
        if not usual or (weight is not None and weight.requires_grad and not x.requires_grad):
            return func(*args, **kwargs)  # torch shall judge
        if given.get("training"):
            F._verify_batch_size(x.size())  # pyright: ignore[reportAttributeAccessIssue]
        return x.clone()


def _blind(func: Any, name: str, args: Any, kwargs: Any) -> bool:
    """Whether a call neither reads a size nor is given one, so that it is the same call at any size."""
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", "") not in ("shape", "nbytes")
    if name in _POOLS:
        given = args[1] if len(args) > 1 else kwargs.get("output_size")
        return None not in (given if isinstance(given, list | tuple) else (given,))
    return name in _BLIND


def _active_dropout(func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> str:
    """``" with dropout"`` for attention and recurrent functions whose dropout is on: no module carries it."""
    if name == "scaled_dot_product_attention":
        rate = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    elif name == "multi_head_attention_forward":
        given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        given.apply_defaults()
        rate = given.arguments["dropout_p"] if given.arguments["training"] else 0.0
    elif name in ("lstm", "gru", "rnn_tanh", "rnn_relu") and len(args) > 6:
        rate = args[-4] if args[-3] is True else 0.0  # (..., dropout, training, bidirectional[, batch_first])
        rate = rate if isinstance(rate, float) else 0.0
    else:
        return ""
    return " with dropout" if rate else ""


@contextmanager
def _watched(model: nn.Module, stack: list[Any], seen: Behaviour, leaves: set[str]) -> Iterator[None]:
    """Keep the running layer's path on ``stack`` (None inside a leaf), by hooks that are removed again."""
    handles = []
    for path, module in model.named_modules():
        inside = None if path in leaves else path

        def enter(_module: Any, _args: Any, inside: Any = inside) -> None:
            stack.append(None if stack[-1] is None else inside)

        def leave(_module: Any, given: Any, result: Any, path: str = path) -> None:
            stack.pop()
            if path in leaves and _size(given[:1]) != _size((result,)):
                seen.resized.add(path)

        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _size(values: tuple[Any, ...]) -> Any:
    value = values[0] if values else None
    return (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None


@contextmanager
def quiet() -> Iterator[None]:
    """torch logs and warns about what is reported or handled here (unused buffers, specialised sizes)."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
