"""Live tensor storage, followed operation by operation: for `measure` on a CPU and `memory` inside a layer.

The mode sees every operation below autograd, so composite operators (layer norms, attention, linear on
sequences) show the temporaries that they allocate. Views and in-place results share a storage, which counts
once, and a storage stops counting when its last tensor dies. What a kernel allocates inside itself (im2col
buffers, oneDNN reorders) is no tensor and stays unseen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class LiveStorage(TorchDispatchMode):
    """Within, ``now`` is the bytes alive and ``peak`` the most of them.

    ``counted`` are tensors that are alive from the start, such as a model's inputs; ``state`` (parameters,
    buffers) never counts. Use under ``torch.no_grad()``: autograd keeps activations alive, and
    ``inference_mode`` hides what composite operators do.
    """

    def __init__(self, counted: Iterable[torch.Tensor] = (), state: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._state = {key(t) for t in state if has_storage(t)}
        self._watched: dict[int, weakref.finalize] = {}
        for tensor in counted:
            self._add(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t for t in pytree.tree_leaves(result) if has_storage(t)]
        fresh = [t for t in made if key(t) not in self._watched and key(t) not in self._state]
        if fresh:
            # A view of a tensor never seen before (a constant of the model) is state, not a new value.
            for tensor in pytree.tree_leaves((args, kwargs)):
                if has_storage(tensor) and key(tensor) not in self._watched and key(tensor) not in self._state:
                    self._state.add(key(tensor))
                    # its place in memory may be taken by a new value once it is gone
                    weakref.finalize(tensor.untyped_storage(), self._state.discard, key(tensor))
            for tensor in fresh:
                self._add(tensor)
        return result

    def __exit__(self, *problem: Any) -> None:
        for watch in self._watched.values():
            watch.detach()
        self._watched.clear()
        super().__exit__(*problem)

    def _add(self, tensor: torch.Tensor) -> None:
        if not has_storage(tensor) or key(tensor) in self._watched or key(tensor) in self._state:
            return
        storage = tensor.untyped_storage()
        self._watched[key(tensor)] = weakref.finalize(storage, self._drop, key(tensor), storage.nbytes())
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)

    def _drop(self, gone: int, size: int) -> None:
        if self._watched.pop(gone, None) is not None:
            self.now -= size


def has_storage(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout is torch.strided


def key(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, for as long as the tensor lives."""
    return tensor.untyped_storage()._cdata
