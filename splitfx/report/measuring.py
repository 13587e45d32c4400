"""What one call of a model really takes: seconds and bytes, measured.

Seconds come from timed runs after a warm-up. Bytes come from a run of their own: on a GPU from the CUDA
allocator, on a CPU from the storage of every tensor that operators return (inputs counted, parameters and
buffers not), plus what the whole process gained where the operating system tells. The model runs in eval
mode without gradients and gets its own mode back; on another device a copy of it runs. Refused with
`UnsupportedError`: a device that is not here, inputs that do not fit.
"""

from __future__ import annotations

import copy
import ctypes
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from splitfx.analysis.live import LiveStorage
from splitfx.errors import UnsupportedError
from splitfx.frontend.example_inputs import inputs_for
from splitfx.ground.notebook import Shown
from splitfx.ground.progress import Say, say, told
from splitfx.ground.table import seconds, size
from splitfx.ground.timing import p90
from splitfx.ground.turns import device_of, timed
from splitfx.ir.modes import in_eval
from splitfx.text import first_line

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Measurement(Shown):
    """One model on one device. Times in seconds, memory in bytes.

    ``peak_bytes``: the most tensor bytes alive at once, inputs included, parameters and buffers not; on a
    GPU it includes what libraries take from the CUDA allocator as workspace. ``process_bytes``: how far the
    resident memory of the process rose above its level before the call, which includes buffers inside
    kernels; None where it cannot be known, and ``process_why`` says why.
    """

    seconds: float
    p90_seconds: float
    runs: int
    peak_bytes: int
    process_bytes: int | None
    process_why: str
    device: str
    threads: int

    def __str__(self) -> str:
        process = size(self.process_bytes) if self.process_bytes is not None else f"unknown ({self.process_why})"
        where = (
            self.device
            if self.device.startswith("cuda")
            else f"{self.device}, {self.threads} thread{'s' * (self.threads != 1)}"
        )
        return (
            f"{where}: median {seconds(self.seconds)}, p90 {seconds(self.p90_seconds)} of {self.runs} runs; "
            f"tensors peak at {size(self.peak_bytes)}; process peak {process}"
        )


@told
def measure(
    model: nn.Module,
    example_inputs: Any = None,
    device: str | torch.device = "cpu",
    runs: int = 20,
    *,
    progress: Say = True,
) -> Measurement:
    """Run ``model`` on ``example_inputs`` and measure it.

    ``example_inputs`` is spelled as for `trace`, and may be left out for a graph from `trace` or `transform`, which
    knows its own; floating inputs and the model keep their dtype. ``runs``
    timed calls follow 3 to warm up; the number of threads is torch's current one. On a GPU every run is
    synchronised.

    Raises `UnsupportedError` when ``device`` does not exist here, or the model does not accept the inputs.
    """
    if runs < 1:
        raise UnsupportedError(f"runs must be at least 1; got {runs}")
    say("measuring")
    place = device_of(device)
    args, kwargs = inputs_for(example_inputs, model)
    with in_eval(model), torch.no_grad():
        there = placed(model, place)
        if place.type == "cuda":
            torch.cuda.synchronize(place)
        before = torch.cuda.memory_allocated(place) if place.type == "cuda" else 0
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: _own(t, place), (args, kwargs))
        call = lambda: there(*args, **kwargs)  # noqa: E731
        _try(call, model)
        times = timed({"call": call}, runs, place)["call"]
        peak = _cuda_peak(call, place) - before if place.type == "cuda" else _live_peak(call, there, (args, kwargs))
        process, why = _process_peak(call) if place.type == "cpu" else (None, "the tensors are on the GPU")
    return Measurement(
        statistics.median(times), p90(times), runs, peak, process, why, str(place), torch.get_num_threads()
    )


def placed(model: nn.Module, place: torch.device) -> nn.Module:
    """The model itself where it lies on ``place``, else a copy there."""
    state = [*model.parameters(), *model.buffers()]
    if all(t.device.type == place.type and place.index in (None, t.device.index) for t in state):
        return model
    return copy.deepcopy(model).to(place)


def _own(tensor: torch.Tensor, place: torch.device) -> torch.Tensor:
    """The caller's tensor on ``place`` in a storage of exactly its size, so that bytes mean what they say."""
    moved = tensor.detach().to(place)
    whole = moved.untyped_storage().nbytes() == moved.numel() * moved.element_size()
    fresh = whole and (place.type == "cpu" or moved.data_ptr() != tensor.data_ptr())
    return moved if fresh else moved.clone()


def _try(call: Callable[[], Any], model: nn.Module) -> None:
    try:
        call()
    except (RuntimeError, TypeError, ValueError) as error:
        why = first_line(error)
        raise UnsupportedError(f"{type(model).__name__} does not run on these inputs: {why}") from error


def _live_peak(call: Callable[[], Any], model: nn.Module, inputs: Any) -> int:
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    with LiveStorage(tensors, [*model.parameters(), *model.buffers()]) as live:
        result = call()
    del result
    return live.peak


def _cuda_peak(call: Callable[[], Any], place: torch.device) -> int:
    torch.cuda.synchronize(place)
    torch.cuda.reset_peak_memory_stats(place)
    result = call()
    torch.cuda.synchronize(place)
    del result
    return torch.cuda.max_memory_allocated(place)


def _process_peak(call: Callable[[], Any]) -> tuple[int | None, str]:
    """Bytes by which resident memory rises during a call: VmHWM, reset by the kernel, above VmRSS."""
    if not _CLEAR.exists():
        return None, "only Linux can reset a process's peak memory"
    try:
        _give_back_freed_memory()
        _CLEAR.write_text("5")
        before = _status("VmRSS")
        result = call()
        peak = _status("VmHWM")
    except (OSError, KeyError) as error:
        return None, f"the peak memory of this process cannot be read: {error}"
    del result
    return max(0, peak - before), ""


def _give_back_freed_memory() -> None:
    """Freed blocks that malloc keeps would hide the rise; other C libraries have no malloc_trim."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(field: str) -> int:
    words = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines() if ":" in line)
    return int(words[field].split()[0]) * 1024
