"""One thread at a time looks at graphs, and in none of the modes of its caller.

Sizes, memory and traces come from torch's fake tensors and its tracer, which keep state of the whole process. So all of
it happens within `exclusive`: under one lock, and without the caller's inference mode, autocast and dispatch modes,
which belong to a thread and would otherwise end up in what is kept. Running a model needs no lock: what others may be
running is looked at as a `twin`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

T = TypeVar("T")
_lock = threading.RLock()
_DEVICES = ("cpu", "cuda", "mps", "xpu")  # that know autocast
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

Autocast = tuple[tuple[str, torch.dtype], ...]


def reseed(seed: int, devices: Iterable[torch.device] = ()) -> None:
    """Seed the CPU's generator and those of these CUDA devices. `torch.manual_seed` moves the generators of all
    devices, which nobody puts back, and without CUDA it writes its whole stack down each time, for later."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        torch.cuda.default_generators[device.index].manual_seed(seed)


def _renew() -> None:
    """The thread that held the lock in the parent does not exist in a forked child."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew)


@contextmanager
def fresh() -> Iterator[None]:
    """Within, torch computes as in a fresh thread, whatever modes the caller is in."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device, _ in autocasts():
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_disable_current_modes())
        yield


@contextmanager
def exclusive() -> Iterator[None]:
    """Within, no other thread is inside, and torch computes as in a fresh one."""
    with _lock, fresh():
        yield


class kept(Generic[T]):
    """A property that is computed once, as `functools.cached_property` is, but without its lock: before Python 3.12
    a child that is forked while another thread holds it waits for good."""

    def __init__(self, compute: Callable[[Any], T]) -> None:
        self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> T:
        if instance is None:
            return cast(Any, self)
        return vars(instance).setdefault(self.name, self.compute(instance))

    if TYPE_CHECKING:  # it may be assigned, since that is what computing it does

        def __set__(self, instance: Any, value: T) -> None: ...


class once(kept[T]):
    """A kept property that one thread computes, within `exclusive`."""

    def __get__(self, instance: Any, owner: type[Any] | None = None) -> T:
        if instance is None:
            return super().__get__(instance, owner)
        with exclusive():  # another thread may have been here first
            return vars(instance)[self.name] if self.name in vars(instance) else super().__get__(instance, owner)


def autocasts() -> Autocast:
    """The devices on which the caller's thread casts by itself, each with the type to which it does."""
    if not torch.is_autocast_enabled("cpu") and not torch._C._is_any_autocast_enabled():
        return ()
    return tuple((d, torch.get_autocast_dtype(d)) for d in _DEVICES if torch.is_autocast_enabled(d))


@contextmanager
def casting(given: Autocast) -> Iterator[None]:
    """Within, torch casts as `autocasts` says; nothing of it is kept."""
    with ExitStack() as stack:
        for device, dtype in given:
            stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
        yield


def twin(
    module: nn.Module, swap: Callable[[torch.Tensor], torch.Tensor], swapped: dict[int, torch.Tensor] | None = None
) -> nn.Module:
    """The module anew, in eval mode, with what ``swap`` gives for each of its tensors: to run it on other values while
    other threads run it. It shares everything else, and has none of the user's hooks."""
    swapped = {} if swapped is None else swapped
    made = object.__new__(type(module))
    own = vars(made)
    own.update(vars(module))
    own.update({name: type(own[name])() for name in _HOOKS if name in own})
    own["training"] = False
    for table in ("_parameters", "_buffers"):
        for tensor in own[table].values():
            if tensor is not None and id(tensor) not in swapped:
                swapped[id(tensor)] = swap(tensor)
        own[table] = {name: t if t is None else swapped[id(t)] for name, t in own[table].items()}
    own["_modules"] = {name: m if m is None else twin(m, swap, swapped) for name, m in own["_modules"].items()}
    return made
