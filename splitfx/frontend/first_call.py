"""The first call of a model, on a private copy with buffers of its own and real tensors, before it is traced.

Models make tables, anchors and masks when they first run, and keep them, and put hooks on their layers; torch.export
would meet the code that makes them, and not what they are. So that code runs here, and what it made is installed in
the copy that is traced. What a
second call changes again (a counter, a moving average, the features of the last image) belongs to the calls: it is
left as the user has it. Nothing of the user's moves: no buffer, no attribute, no state of a random generator. Layers
and parameters that the first call makes are refused: their random values would not be the user's.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from splitfx.analysis.oracle import cuda_devices
from splitfx.errors import TraceError
from splitfx.ground.exclusive import reseed
from splitfx.ir.copies import anew
from splitfx.ir.notes import Note

_HOOKS = frozenset(name for name in vars(nn.Module()) if "hooks" in name)  # tables of them, in every module
_TORCHS = frozenset(vars(nn.Module())) - _HOOKS  # what else torch keeps in every module
_PLAIN = (int, float, complex, str, bytes, torch.dtype, torch.device, type(None))

Key = tuple[str, str]  # path of a module, name of what it holds


@dataclass
class FirstCall:
    """``outputs`` and the ``inputs`` as the call left them; ``buffers`` that it wrote, as it left them; ``made`` is
    what it made once, to be installed before tracing."""

    outputs: Any
    inputs: Any
    buffers: dict[str, torch.Tensor] = field(default_factory=dict)
    made: dict[Key, Any] = field(default_factory=dict)
    modules: dict[str, nn.Module] = field(default_factory=dict)  # that ran, by path: what was made may hold them
    registered: dict[Key, bool] = field(default_factory=dict)  # of ``made``: buffers, and whether they are saved
    keeps: bool = False  # it made or changed something

    def install(self, private: nn.Module) -> nn.Module:
        """``private`` with what was made; the values are the first call's own, and no model's else."""
        own = dict(private.named_modules())
        places: dict[int, Any] = {id(module): own[path] for path, module in self.modules.items()}
        places |= {id(t): vars(own[p])[name] for p, m in self.modules.items() for name, t in _hook_tables(m).items()}
        leaves = pytree.tree_leaves(list(self.made.values()))
        places |= {id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}
        for (path, name), value in copy.deepcopy(self.made, places).items():
            module = own[path]
            if name in _HOOKS:  # the table itself may be known to what takes hooks away again
                vars(module)[name].clear()
                vars(module)[name].update(value)
            elif (path, name) not in self.registered:
                vars(module)[name] = value
            else:
                vars(module).pop(name, None)  # None, until it was registered
                module.register_buffer(name, value, persistent=self.registered[path, name])
        return private

    def notes(self) -> list[Note]:
        by_path: dict[str, list[str]] = {}
        for path, name in (key for key in self.made if key[1] not in _HOOKS):
            by_path.setdefault(path, []).append(name)
        what = "made in the first call: the graph holds what a first call on these inputs makes"
        return [Note(path or "model", f"{', '.join(names)}: {what}", "info") for path, names in by_path.items()]


def first_call(own: nn.Module, inputs: Any) -> FirstCall:
    """Run ``own``, an `own_copy`, once on ``inputs``, ``(args, kwargs)``; a second time only if it keeps something."""
    modules, parameters = set(own.modules()), set(own.parameters())
    marks, alive = _marks(own)
    record = FirstCall(*run(own, inputs))
    _no_new_weights(own, modules, parameters)
    after = _held(own)
    changed = {key: after[key] for key, mark in _marks(own)[0].items() if marks.get(key) != mark}
    del alive
    if not changed:
        return record
    record.keeps = True
    record.modules = dict(own.named_modules())
    changed = _apart(changed, modules)
    for path, name in changed:
        module = own.get_submodule(path)
        if module._buffers.get(name) is not None:
            record.registered[path, name] = name not in module._non_persistent_buffers_set
            record.buffers[f"{path}.{name}" if path else name] = changed[path, name].clone()
    _call_again(own, inputs)
    after = _held(own)
    record.made = {key: value for key, value in changed.items() if key in after and _same(value, after[key])}
    return record


def own_copy(model: nn.Module) -> nn.Module:
    """The model's module tree anew, in eval mode: the same parameters, all other tensors its own."""
    return anew(model, lambda t: t if isinstance(t, nn.Parameter) else t.detach().clone()).eval()


def run(model: Any, inputs: Any) -> tuple[Any, Any]:
    """What ``model`` returns for copies of ``inputs``, and those copies afterwards; every run draws the same."""
    args, kwargs = pytree.tree_map(lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else v, inputs)
    owner = model if isinstance(model, nn.Module) else model.module  # of an interpreter
    with torch.no_grad(), unfused():
        reseed(0, cuda_devices(owner))
        random.seed(0)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(0)
        return model(*args, **kwargs), (args, kwargs)


@contextmanager
def unfused() -> Iterator[None]:
    """Without the fused path of nn.MultiheadAttention, which no training takes."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Within, random generators may be used, and no inference mode or autocast of the caller's is on."""
    numpy = sys.modules.get("numpy")
    state, drawn = random.getstate(), numpy.random.get_state() if numpy else None
    places = {t.device for ts in (model.parameters(), model.buffers()) for t in ts}
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.random.fork_rng(sorted((d for d in places if d.type == "cuda"), key=str)))
        for kind in {"cpu", *(d.type for d in places)} - {"meta"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            yield
        finally:
            random.setstate(state)
            if numpy:
                numpy.random.set_state(drawn)


def _call_again(own: nn.Module, inputs: Any) -> None:
    """With other values, so that what depends on them is seen to change; the same ones where the model refuses."""
    floats = lambda v: isinstance(v, torch.Tensor) and v.dtype.is_floating_point  # noqa: E731
    other = pytree.tree_map(lambda v: 1 - v.detach() if floats(v) else v, inputs)
    try:
        run(own, other)
    except Exception:
        run(own, inputs)


def _no_new_weights(own: nn.Module, modules: set[nn.Module], parameters: set[nn.Parameter]) -> None:
    new = [path for path, m in own.named_modules() if m not in modules]
    new += [path for path, p in own.named_parameters() if p not in parameters]
    if new:
        raise TraceError(
            f"{type(own).__name__} makes layers or parameters in its first call ({', '.join(new[:3])}): call the model "
            "once on such inputs before it is traced, so that they are the model's own"
        )


def _held(model: nn.Module) -> dict[Key, Any]:
    """Buffers and attributes, by module and name."""
    held: dict[Key, Any] = {}
    for path, module in model.named_modules():
        held.update({(path, name): value for name, value in vars(module).items() if name not in _TORCHS})
        held.update({(path, name): value for name, value in module._buffers.items()})
    return held


def _marks(model: nn.Module) -> tuple[dict[Key, Any], list[Any]]:
    """What differs after something was written or exchanged, and the things that must live for that to hold."""
    alive: list[Any] = []

    def mark(value: Any) -> Any:
        if isinstance(value, _PLAIN):
            return value
        if isinstance(value, torch.Tensor):
            alive.append(value)
            return id(value), 0 if value.is_inference() else value._version
        if isinstance(value, list | tuple):
            return type(value), *map(mark, value)
        if isinstance(value, dict):
            return dict, *((mark(k), mark(v)) for k, v in value.items())
        alive.append(value)
        return (id(value), len(value)) if isinstance(value, set | frozenset) else id(value)

    return {key: mark(value) for key, value in _held(model).items()}, alive


def _apart(values: dict[Key, Any], modules: set[nn.Module]) -> dict[Key, Any]:
    """Copies that no later call writes to; what was one tensor stays one, and layers, weights and hooks themselves."""
    tensors = [t for t in pytree.tree_leaves(list(values.values())) if isinstance(t, torch.Tensor)]
    memo: dict[int, Any] = {id(t): t if isinstance(t, nn.Parameter) else t.detach().clone() for t in tensors}
    memo |= {id(kept): kept for module in modules for kept in (module, *_hook_tables(module).values())}
    hooks = {key: copy.copy(table) for key, table in values.items() if key[1] in _HOOKS}
    return copy.deepcopy({key: value for key, value in values.items() if key not in hooks}, memo) | hooks


def _hook_tables(module: nn.Module) -> dict[str, dict[int, Any]]:
    return {name: vars(module)[name] for name in _HOOKS if isinstance(vars(module).get(name), dict)}


def _same(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return alike and (one.device.type == "meta" or bool(torch.equal(one, other)))
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    return one == other or (hasattr(one, "__dict__") and vars(one) != {} and _same(vars(one), vars(other)))
