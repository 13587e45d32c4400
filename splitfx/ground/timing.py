"""How long a call takes; a GPU is waited for, since it answers before it is done."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch  # a process that only runs onnxruntime starts without it


def synchronizer(device: torch.device) -> Callable[[], None]:
    """A function that waits until a device has done what it was given."""
    if device.type != "cuda":
        return lambda: None
    import torch

    return lambda: torch.cuda.synchronize(device)


def took(call: Callable[[], Any], synchronize: Callable[[], None] = lambda: None) -> float:
    """Seconds of one call, from synchronized to synchronized."""
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def p90(times: Iterable[float]) -> float:
    """What nine of ten calls do not exceed."""
    ordered = sorted(times)
    return ordered[math.ceil(0.9 * len(ordered)) - 1]
