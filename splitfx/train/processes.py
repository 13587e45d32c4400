"""The processes that train together, their devices and their precision: Hugging Face accelerate.

Promises: a run's settings are its own. Accelerate keeps those of the first in a process for good; here they are put
back when a run ends, so that one process can train in several precisions, and a user's own accelerator is left alone.
Refuses (`TrainingError`): a precision that the device does not have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from splitfx.errors import MissingExtraError, TrainingError


@contextmanager
def accelerated(mixed_precision: str, device: str, unused: bool) -> Iterator[Any]:
    """An accelerator. ``unused``: there may be parameters that the loss does not depend on."""
    if device not in ("auto", "cpu"):
        raise TrainingError(f"device is 'auto' or 'cpu', not {device!r}; CUDA_VISIBLE_DEVICES chooses among GPUs")
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState, PartialState
        from accelerate.utils import DistributedDataParallelKwargs
    except ImportError as error:
        raise MissingExtraError(f"accelerate cannot be imported ({error}): pip install 'splitfx[train]'") from None
    states = [one._shared_state for one in (AcceleratorState, PartialState, GradientState)]
    kept = [dict(one) for one in states]
    for state in states:
        state.clear()
    try:
        try:
            accelerator = Accelerator(
                # Without a GPU accelerate must be told, or the processes of torchrun each train alone.
                cpu=device == "cpu" or not torch.accelerator.is_available(),
                mixed_precision=mixed_precision,
                kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
            )
        except ValueError as error:
            raise TrainingError(f"accelerate refuses mixed_precision={mixed_precision} here: {error}") from error
        if mixed_precision != "no" and not accelerator.native_amp:  # accelerate says nothing and trains in full
            raise TrainingError(
                f"mixed_precision={mixed_precision} is not possible on {accelerator.device.type}: a CPU trains with "
                "'bf16' or 'no'"
            )
        yield accelerator
    finally:
        for state, before in zip(states, kept, strict=True):
            state.clear()
            state.update(before)


def launched() -> tuple[int, int]:
    """This process's number and their count, as ``torchrun`` says before there is an accelerator."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
