"""Grouped convolution or narrow branches: measured, for the very shapes, memory format, type and device.

Neither is faster everywhere, and no rule of thumb predicts it, so both are run. Results are kept per shape for the
life of the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Literal

import torch
from torch import fx, nn
from torch.nn import functional

from splitfx.analysis import Facts
from splitfx.analysis.blocks import Block
from splitfx.analysis.shapes import shape
from splitfx.carving.division import Division, Divisions
from splitfx.ground.exclusive import exclusive
from splitfx.ground.timing import synchronizer, took
from splitfx.ir.graph import layer, module_of
from splitfx.ir.ops import op, op_name
from splitfx.ir.ops.channels import is_channels_last

REPEATS, ENOUGH_SECONDS = 3, 0.05


Lowering = Literal["auto", "grouped", "branches"]


def choose_lowering(
    asked: Lowering, known: Facts, block: Block, nodes: list[fx.Node], divisions: Divisions
) -> tuple[Literal["grouped", "branches"], str]:
    """Grouped convs or narrow branches for the divided ``nodes`` of a block, and why."""
    uneven = next((n for n in nodes if not divisions[n].even and _groups(n) == 1), None)
    if uneven is not None:
        sizes = "/".join(str(len(o)) for o in divisions[uneven].outs)
        return "branches", f"{layer(uneven)} has branches of unequal width or shared input, {sizes}"
    if asked != "auto":
        return asked, "as asked"
    relaid = _relays_channels(block)
    if relaid:
        return "branches", f"{relaid} lays channels anew, which grouped convs would have to undo"
    convs = {n: module_of(n) for n in nodes if _groups(n) == 1}
    seconds = [
        lowering_seconds(conv, divisions[n], _input_sizes(known, n, conv.in_channels))
        for n, conv in convs.items()
        if isinstance(conv, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    grouped, separate = (1000 * sum(s[i] for s in seconds) for i in (0, 1))
    why = f"measured: grouped {grouped:.2f} ms, branches {separate:.2f} ms"
    return "grouped" if grouped <= separate else "branches", why


def _groups(node: fx.Node) -> int:
    return getattr(module_of(node), "groups", 1)


def _input_sizes(known: Facts, node: fx.Node, channels: int) -> tuple[int, ...]:
    """Sizes that the conv reads, at its width after widening; a fusion in front of it changes no other size."""
    operand = node.args[0]
    while operand not in known.shapes:
        operand = operand.args[0]  # type: ignore[union-attr]
    before = shape(known.shapes[operand])  # type: ignore[index]
    return (before[0], channels, *before[2:])


def _relays_channels(block: Block) -> str:
    node, last = block.edges[0].node, block.edges[-1].node
    while node is not last:
        if op(node).relays:
            return f"{op_name(node)} at {layer(node)}"
        node = node.next
    return ""


def lowering_seconds(module: nn.Module, division: Division, sizes: tuple[int, ...]) -> tuple[float, float]:
    """Seconds of one forward as (grouped conv, narrow branches) on a batch of the spatial sizes in ``sizes``; the
    grouped conv of an uneven division is the one whose groups are all padded to the largest."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    options = tuple(getattr(module, name) for name in ("stride", "padding", "dilation"))
    blocks = tuple((len(o), len(i)) for i, o in zip(division.ins, division.outs, strict=True))
    with exclusive():  # two that measure at once slow each other down
        return _seconds(
            blocks,
            tuple(weight.shape[2:]),
            (sizes[0], *sizes[2:]),
            options,
            is_channels_last(weight),
            weight.dtype,
            str(weight.device),
            torch.get_num_threads(),
        )


@cache
def _seconds(
    blocks: tuple[tuple[int, int], ...],
    kernel: tuple[int, ...],
    sizes: tuple[int, ...],
    options: tuple,
    last: bool,
    dtype: torch.dtype,
    device: str,
    threads: int,
) -> tuple[float, float]:
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 1]
    layout = torch.channels_last if last else torch.contiguous_format
    stride, padding, dilation = options
    count, outs, ins = len(blocks), max(o for o, _ in blocks), max(i for _, i in blocks)

    def made(*size: int) -> torch.Tensor:
        return torch.full(size, 0.1, dtype=dtype, device=device).contiguous(memory_format=layout)

    whole, together = made(sizes[0], count * ins, *sizes[1:]), made(count * outs, ins, *kernel)
    parts, weights = [made(sizes[0], i, *sizes[1:]) for _, i in blocks], [made(o, i, *kernel) for o, i in blocks]

    def grouped() -> None:
        convolve(whole, together, None, stride, padding, dilation, count)

    def separate() -> None:
        for part, weight in zip(parts, weights, strict=True):
            convolve(part, weight, None, stride, padding, dilation)

    return alternate(grouped, separate, device)


def alternate(first: Callable[[], None], second: Callable[[], None], device: str) -> tuple[float, float]:
    """The least seconds of each, taken in turn so that a busy machine treats both alike."""
    best, synchronize = [float("inf")] * 2, synchronizer(torch.device(device))
    with torch.inference_mode():
        for run in (first, second):
            run()  # the first call of a shape picks kernels
        started = time.perf_counter()
        for _ in range(REPEATS):
            for i, run in enumerate((first, second)):
                best[i] = min(best[i], took(run, synchronize))
            if time.perf_counter() - started > ENOUGH_SECONDS:
                break
    return best[0], best[1]
