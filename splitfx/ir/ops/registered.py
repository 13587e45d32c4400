"""Operators of other libraries: one call of `register_op` makes one known to every analysis and every pass.

A package registers its own by an entry point in the group "splitfx.ops": a function without arguments that calls
`register_op`. It is called when a graph first holds an operator that has no row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch

from splitfx.errors import SplitfxError
from splitfx.ir.ops.pieces import Call, Job, Piece, Pieces, Span, padded, read_alone, real_rows
from splitfx.ir.ops.reading import bind
from splitfx.ir.ops.row import ROWS, Bound, Channel, Op, Spatial, Window, add
from splitfx.ir.schema import aten_name, mutates, qualified_name


def register_op(
    operator: Any,
    *,
    rows: Literal["same", "window", "unknown"] = "unknown",
    channels: Literal["same", "unknown"] = "unknown",
    window: Callable[[Bound], Window] | None = None,
    padding: str = "",
    pad_value: float = 0.0,
    per_channel: tuple[str, ...] = (),
    per_output: int | None = None,
    macs: Callable[[Bound, Callable[[Any], tuple[int, ...]], int], int] | None = None,
    decomposition: Callable[..., Any] | None = None,
) -> None:
    """Tell splitfx what an operator does, so that passes and analyses follow it.

    ``operator``: as ``torch.ops.lib.name``, one of its overloads, or what `torch.library.custom_op` returns. Its first
    argument is the data, [N, C, spatial axes ...].

    ``rows``: what a row of the output needs of the input: the ``"same"`` row, the rows under a ``"window"``, or
    ``"unknown"``, at which passes stop. ``window(arguments)`` gives the `Window` of a call, with one entry per spatial
    axis; ``padding`` names the argument by which the operator pads both sides of every axis, with ``pad_value``. On a
    piece of a map it is called with zeros there, on a piece that is padded where it lies at the border.

    ``channels``: ``"same"`` where channel i of the output follows from channel i of the inputs alone. ``per_channel``:
    arguments of one dim with one value per channel, such as a scale.

    ``per_output``: elementwise operations per element of the output; None: its cost is listed as not counted.
    ``macs(arguments, sizes, elements)``: multiply-accumulates of a call; ``sizes(value)`` are those of an argument,
    ``elements`` those of the output. ``decomposition``: a function of the same arguments in operators of torch, which
    ONNX is written from; without one, exports refuse a model that calls it.

    Raises `SplitfxError` for an operator that overwrites its arguments, one that has a row already, arguments that it
    does not have, and a window without ``window``.
    """
    target = _overload(operator)
    name = qualified_name(target) or aten_name(target)
    known = {spec.name for spec in target._schema.arguments}
    if mutates(target):
        raise SplitfxError(f"{name} overwrites its arguments: only operators that return new tensors can be registered")
    if name in ROWS:
        raise SplitfxError(f"{name} is known already: an operator is registered once")
    if missing := [one for one in (*per_channel, *([padding] if padding else [])) if one not in known]:
        raise SplitfxError(f"{name} has no argument {missing[0]!r}; it has {', '.join(sorted(known))}")
    if (rows == "window") != (window is not None):
        raise SplitfxError(f"{name}: rows='window' and window= belong together")
    spatial = {"same": Spatial.POINTWISE, "window": Spatial.WINDOW, "unknown": Spatial.UNKNOWN}[rows]
    add(
        Op(
            name=name,
            spatial=spatial,
            channel=Channel.SAME if channels == "same" else Channel.UNKNOWN,
            per_output=per_output if macs is None else per_output or 0,
            macs=macs,
            per_channel=per_channel,
            window=(lambda bound, axes, weight: window(bound)) if window is not None else None,
            piece=functools.partial(_windowed, padding, pad_value) if window is not None else None,
            workspace=_padded if window is not None else None,
            decomposition=decomposition,
        )
    )


def unregister_op(operator: Any) -> None:
    """Forget an operator that was registered; for tests."""
    target = _overload(operator)
    ROWS.pop(qualified_name(target) or aten_name(target))


def _overload(operator: Any) -> torch._ops.OpOverload:
    target = getattr(operator, "_opoverload", operator)
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if not isinstance(target, torch._ops.OpOverload):
        raise SplitfxError(f"{operator!r} is no operator: give torch.ops.library.name, or what custom_op returned")
    return target


# ---------------------------------------------------------------- pieces of a window


def _windowed(padding: str, value: float, job: Job) -> Call:
    """The operator called on a piece, padded by hand where it lies at the border of the map."""
    target: Any = job.node.target
    first, *others = (spec.name for spec in target._schema.arguments)
    given = {name: job.argument(name) for name in others if name in bind(job.node)}

    def call(run: Piece, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x = padded(read_alone(job, pieces[0], run), job.pads(run.pads[0], pieces[0].shape[4:]), value=value)
        found = {name: argument(pieces, wholes) for name, argument in given.items()}
        if padding:
            found[padding] = [0] * len(found[padding]) if isinstance(found[padding], list | tuple) else 0
        return target(**{first: x}, **found)

    return call


def _padded(job: Job, span: Span) -> int:
    real, _, pads = real_rows(job, span)
    return job.reads[0].bytes([n + sum(one) for n, one in zip(real, pads, strict=True)]) if any(map(any, pads)) else 0
