"""Grouped convolution or narrow branches: measured, for the very shapes, memory format, type and device.

Neither is faster everywhere, and no rule of thumb predicts it, so both are run. Results are kept per shape for the
life of the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.nn import functional

from splitfx.carve import Division

REPEATS, ENOUGH_SECONDS = 3, 0.05


def lowering_seconds(module: nn.Module, division: Division, sizes: tuple[int, ...]) -> tuple[float, float]:
    """Seconds of one forward as (grouped conv, narrow branches) on an input of ``sizes``; the division is even."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    last = (
        weight.dim() == 4
        and not weight.is_contiguous()
        and weight.is_contiguous(memory_format=torch.channels_last)
    )
    options = tuple(getattr(module, name) for name in ("stride", "padding", "dilation"))
    block = (len(division.outs[0]), len(division.ins[0]), *weight.shape[2:])
    return _seconds(
        block,
        len(division.ins),
        sizes,
        options,
        last,
        weight.dtype,
        str(weight.device),
        torch.get_num_threads(),
    )


@cache
def _seconds(
    block: tuple[int, ...],
    branches: int,
    sizes: tuple[int, ...],
    options: tuple,
    last: bool,
    dtype: torch.dtype,
    device: str,
    threads: int,
) -> tuple[float, float]:
    convolve = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}[len(block)]
    layout = torch.channels_last if last else torch.contiguous_format
    stride, padding, dilation = options
    narrow = (sizes[0], block[1], *sizes[2:])
    parts = [
        torch.randn(narrow, dtype=dtype, device=device).contiguous(memory_format=layout)
        for _ in range(branches)
    ]
    weights = [
        torch.randn(block, dtype=dtype, device=device).contiguous(memory_format=layout)
        for _ in range(branches)
    ]
    whole = torch.cat(parts, 1).contiguous(memory_format=layout)
    together = torch.cat(weights).contiguous(memory_format=layout)

    def grouped() -> None:
        convolve(whole, together, None, stride, padding, dilation, branches)

    def separate() -> None:
        for part, weight in zip(parts, weights, strict=True):
            convolve(part, weight, None, stride, padding, dilation)

    return alternate(grouped, separate, device)


def alternate(first: Callable[[], None], second: Callable[[], None], device: str) -> tuple[float, float]:
    """The least seconds of each, taken in turn so that a busy machine treats both alike."""
    best = [float("inf")] * 2
    with torch.inference_mode():
        for run in (first, second):
            run()  # the first call of a shape picks kernels
        started = time.perf_counter()
        for _ in range(REPEATS):
            for i, run in enumerate((first, second)):
                best[i] = min(best[i], _time(run, device))
            if time.perf_counter() - started > ENOUGH_SECONDS:
                break
    return best[0], best[1]


def _time(run: Callable[[], None], device: str) -> float:
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
