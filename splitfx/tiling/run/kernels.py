"""Kernels: one piece of one value computed from pieces of its operands, exactly as the whole would be.

Padding is real only where a piece lies at the border of the map. Divisors of average pools, coordinates of resizes and
windows of adaptive pools come from the positions in the whole map.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from splitfx.analysis.memory import _PASS_THROUGH
from splitfx.analysis.regions import PARTS
from splitfx.analysis.taps import (
    PADS,
    adaptive_size,
    padded_rows,
    padding_mode,
    resize_scale,
    resize_taps,
    resized,
)
from splitfx.ir.graph import attribute, module_of
from splitfx.ir.ops import Spatial, Window, bind, is_size, op, op_name, out_of_place
from splitfx.tiling.plan.instructions import Run
from splitfx.tiling.plan.scratch import pool_pads_itself, transposed_ends, window_span
from splitfx.tiling.plan.stage import Kernel, Kind, Stage, overwriting, own_padding

Pieces = Sequence[torch.Tensor]
Call = Callable[[Run, Pieces, Pieces], torch.Tensor]
# Results that may lie in the operand: a piece must not keep a larger one alive, nor be overwritten with it.
_VIEWS = ("permute", "transpose", "slice", "narrow", "to", "contiguous", "detach", "alias", *_PASS_THROUGH)


class Calls:
    """For every kernel of a stage the function that computes a piece of it: ``call(run, pieces, wholes)``."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._known: dict[Kernel, Call] = {}

    def __getitem__(self, kernel: Kernel) -> Call:
        if kernel not in self._known:
            self._known[kernel] = self._made(kernel)
        return self._known[kernel]

    def _made(self, kernel: Kernel) -> Call:
        by_hand = self._by_hand(kernel)
        if by_hand is None:
            return self._plain(kernel)
        dtype = self.stage.values[kernel.node].dtype
        # Under autocast the operation itself would cast here.
        return lambda run, pieces, wholes: by_hand(run, [piece.to(dtype) for piece in pieces], wholes)

    def _by_hand(self, kernel: Kernel) -> Call | None:
        """For what cannot be called on pieces as it is."""
        node, name = kernel.node, op_name(kernel.node)
        if kernel.role == "apply":
            return self._norm(kernel)
        if kernel.kind is Kind.WHOLE:
            return None
        if name in PADS:
            return _pad(kernel, self.stage)
        spatial = op(node).spatial
        if spatial is Spatial.WINDOW:
            if "pool" in name:
                return _max_pool(kernel, self.stage) if "max" in name else _avg_pool(kernel, self.stage)
            return self._transposed(kernel) if "transpose" in name else self._conv(kernel)
        if spatial is Spatial.RESIZE:
            return _shuffle(kernel) if "pixel" in name else _resize(kernel, self.stage)
        if adaptive_size(node, self.stage.values) is not None:
            return _adaptive(kernel)
        if name == "getitem":
            return self._part(kernel)
        if name in ("view", "_unsafe_view", "reshape"):
            return _reshape(kernel, self.stage)
        return None

    # ------------------------------------------------------------ operands

    def _resolver(self, kernel: Kernel, value: Any) -> Callable[[Pieces, Pieces], Any]:
        """How an argument of the node is found among pieces, whole values, parameters and constants."""
        if isinstance(value, list | tuple) and any(isinstance(v, fx.Node) for v in value):
            parts, kind = [self._resolver(kernel, v) for v in value], type(value)
            return lambda pieces, wholes: kind(part(pieces, wholes) for part in parts)
        if not isinstance(value, fx.Node):
            return lambda pieces, wholes: value
        place = kernel.places.get(value)
        if place is not None:
            return (lambda pieces, wholes: pieces[place]) if place >= 0 else (lambda pieces, wholes: wholes[-1 - place])
        if value.op == "get_attr":
            graph, path = self.stage.graph, str(value.target)
            return lambda pieces, wholes: attribute(graph, path)
        if not is_size(value):
            raise AssertionError(f"{kernel.name} reads {value.name}, which the stage does not hold")
        number = self.stage.values[value]
        return lambda pieces, wholes: number

    def _argument(self, kernel: Kernel, name: str) -> Callable[[Pieces, Pieces], Any]:
        """A module's parameter, looked up at every call because it may be moved or replaced; or an argument."""
        module = module_of(kernel.node)
        if module is not None:
            return lambda pieces, wholes: getattr(module, name)
        return self._resolver(kernel, bind(kernel.node).get(name))

    def _plain(self, kernel: Kernel) -> Call:
        node, module = kernel.node, module_of(kernel.node)
        arguments = [self._resolver(kernel, a) for a in node.args]
        options = {k: self._resolver(kernel, v) for k, v in node.kwargs.items()}
        target: Any = module if module is not None else out_of_place(node.target)
        over, copies = overwriting(node), op_name(node) in _VIEWS
        converts = op_name(node) == "to"  # which copies by itself, but for a type that the operand has already
        # Of a sum or a product of two, either may be overwritten.
        second = (
            kernel.places.get(node.args[1], -1) if len(node.args) == 2 and isinstance(node.args[1], fx.Node) else -1
        )

        def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
            given = [a(pieces, wholes) for a in arguments]
            if run.over >= 0 and over is not None:
                if second >= 0 and run.srcs[second] == run.over:
                    given = [given[1], given[0]]
                return over(*given, **{k: v(pieces, wholes) for k, v in options.items()})
            found = target(*given, **{k: v(pieces, wholes) for k, v in options.items()})
            same = copies and (not converts or found.dtype == given[0].dtype)
            return found.clone(memory_format=torch.contiguous_format) if same else found

        return call

    def _part(self, kernel: Kernel) -> Call:
        """One part of a split along channels."""
        split = kernel.node.args[0]
        assert isinstance(split, fx.Node)
        assert op_name(split) in PARTS
        dim, place = int(bind(split).get("dim") or 0), int(kernel.node.args[1])  # type: ignore[arg-type]
        sizes = [int(part.shape[dim]) for part in self.stage.values[split]]
        first, count = sum(sizes[:place]), sizes[place]
        return lambda run, pieces, wholes: pieces[0].narrow(dim, first, count).clone()

    # ------------------------------------------------------------ convolutions

    def _conv(self, kernel: Kernel) -> Call:
        weight, bias = self._argument(kernel, "weight"), self._argument(kernel, "bias")
        given = bind(kernel.node)
        stride, dilation, groups = given["stride"], given["dilation"], given["groups"]
        rule = self.stage.regions.window(kernel.node)

        def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
            x, padding = _bordered(rule, pieces[0], run, 0.0)
            w, b = weight(pieces, wholes), bias(pieces, wholes)
            return F.conv2d(x, w, b, stride, padding, dilation, groups)

        return call

    def _transposed(self, kernel: Kernel) -> Call:
        weight, bias = self._argument(kernel, "weight"), self._argument(kernel, "bias")
        rule, given = self.stage.regions.window(kernel.node), bind(kernel.node)
        stride, groups, dilation = given["stride"], given["groups"], given["dilation"]

        def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
            w, b = weight(pieces, wholes), bias(pieces, wholes)
            ends = transposed_ends(rule, run.rows, run.columns, run.starts[0], pieces[0].shape[2:])
            if not any(ends):
                return F.conv_transpose2d(pieces[0], w, b, stride, 0, 0, groups, dilation)
            if max(ends) <= 0:  # only rows and columns that are cut off
                y = F.conv_transpose2d(pieces[0], w, b, stride, 0, 0, groups, dilation)
                return F.pad(y, ends)
            y = F.pad(F.conv_transpose2d(pieces[0], w, None, stride, 0, 0, groups, dilation), ends)
            if b is None:
                return y
            b = b.to(y.dtype)[:, None, None]
            return y + b if torch.is_grad_enabled() else y.add_(b)

        return call

    # ------------------------------------------------------------ norms over H and W

    def _norm(self, kernel: Kernel) -> Call:
        weight, bias = self._argument(kernel, "weight"), self._argument(kernel, "bias")
        place = next(i for i, k in enumerate(kernel.takes) if k.role == "statistics")

        def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
            x, (mean, scale) = pieces[0], wholes[place].unbind(0)
            each = x.shape[1] // mean.shape[1]
            mean, scale = mean.repeat_interleave(each, 1), scale.repeat_interleave(each, 1)
            w, b = weight(pieces, wholes), bias(pieces, wholes)
            scale = scale * w if w is not None else scale
            shift = b - mean * scale if b is not None else -mean * scale
            return torch.addcmul(shift.to(x.dtype)[:, :, None, None], x, scale.to(x.dtype)[:, :, None, None])

        return call


def _real(rule: Window, x: torch.Tensor, run: Run) -> torch.Tensor:
    """Of a piece the rows and columns that are read: none of them where windows lie in the padding alone."""
    for axis, (start, stop) in enumerate((run.rows, run.columns)):
        span = window_span(rule, axis, stop - start)
        if sum(run.pads[0][axis]) >= span:
            x = x.narrow(2 + axis, 0, 0)
    return x


def _bordered(rule: Window, x: torch.Tensor, run: Run, value: float) -> tuple[torch.Tensor, tuple[int, int]]:
    """A piece with its real padding, as far as the operation cannot add it itself, and what it can."""
    x, own, explicit = _real(rule, x, run), [], []
    for axis, span in enumerate((run.rows, run.columns)):
        padding = own_padding(rule, axis, run.pads[0][axis], x.shape[2 + axis], span[1] - span[0])
        own.append(padding or 0)
        explicit.append(run.pads[0][axis] if padding is None else (0, 0))
    return (F.pad(x, (*explicit[1], *explicit[0]), value=value) if any(map(any, explicit)) else x), (own[0], own[1])


# ---------------------------------------------------------------- pools


def _max_pool(kernel: Kernel, stage: Stage) -> Call:
    """Along rows, then along columns, as maxima of slices: several times as fast on a CPU as the pooling operator,
    which also allocates an index for every value."""
    a, rule = bind(kernel.node), stage.regions.window(kernel.node)
    lowest = float("-inf")

    def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x = _real(rule, pieces[0], run)
        if torch.is_grad_enabled() or x.device.type not in ("cpu", "meta") or torch.compiler.is_exporting():
            x, padding = _bordered(rule, pieces[0], run, lowest)
            if any(2 * p > k for p, k in zip(padding, rule.kernel, strict=True)):
                x, padding = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), value=lowest), (0, 0)
            return F.max_pool2d(x, rule.kernel, rule.stride, padding, rule.dilation, ceil_mode=False)
        (above, below), (before, after) = run.pads[0]
        if above or below:
            x = F.pad(x, (0, 0, above, below), value=lowest)
        height, width = (stop - start for start, stop in (run.rows, run.columns))
        tall = x.new_empty((*x.shape[:2], height, x.shape[3] + before + after))
        if before or after:
            tall[..., :before] = lowest
            tall[..., tall.shape[3] - after :] = lowest
        _slide(x, 2, rule, 0, height, tall.narrow(3, before, x.shape[3]))
        return _slide(tall, 3, rule, 1, width, x.new_empty((*x.shape[:2], height, width)))

    assert not a.get("return_indices")
    return call


def _slide(x: torch.Tensor, dim: int, rule: Window, axis: int, count: int, out: torch.Tensor) -> torch.Tensor:
    """Maximum over a window along one axis, into ``out``."""
    k, s, d = rule.kernel[axis], rule.stride[axis], rule.dilation[axis]
    index: list[Any] = [slice(None)] * 4
    for i in range(k):
        index[dim] = slice(i * d, i * d + (count - 1) * s + 1, s)
        part = x[tuple(index)]
        if i == 0:
            first = part
        elif i == 1:
            torch.maximum(first, part, out=out)
        else:
            torch.maximum(out, part, out=out)
    return out if k > 1 else out.copy_(first)


def _avg_pool(kernel: Kernel, stage: Stage) -> Call:
    a, rule = bind(kernel.node), stage.regions.window(kernel.node)
    size, stride, padding = rule.kernel, rule.stride, rule.padding
    include, fixed = bool(a["count_include_pad"]), a.get("divisor_override")
    _, h, w = kernel.reads[0]

    @cache
    def divisors(axis: int, start: int, stop: int) -> list[int]:
        length, found = (h, w)[axis].size, []
        for i in range(start, stop):
            low = i * stride[axis] - padding[axis]
            high = min(low + size[axis], length + padding[axis])
            found.append(high - low if include else min(high, length) - max(low, 0))
        return found

    def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        if pool_pads_itself(rule, run.pads[0], pieces[0].shape[2:], run.rows, run.columns):
            x, own = _bordered(rule, pieces[0], run, 0.0)
            return F.avg_pool2d(x, size, stride, own, count_include_pad=include, divisor_override=fixed)
        (above, below), (before, after) = run.pads[0]
        x = F.pad(_real(rule, pieces[0], run), (before, after, above, below))
        if fixed:
            return F.avg_pool2d(x, size, stride, 0, divisor_override=fixed)
        total = F.avg_pool2d(x, size, stride, 0, divisor_override=1)
        del x  # before the divisors are there, one for every place of the map
        down = torch.tensor(divisors(0, *run.rows), dtype=total.dtype, device=total.device)[:, None]
        along = torch.tensor(divisors(1, *run.columns), dtype=total.dtype, device=total.device)
        return total / (down * along) if torch.is_grad_enabled() else total.div_(down * along)

    return call


def _adaptive(kernel: Kernel) -> Call:
    """Each output of an adaptive average pool has a window of its own."""
    _, h, w = kernel.reads[0]

    def band(x: torch.Tensor, left: int, columns: tuple[int, int]) -> torch.Tensor:
        if columns == (0, kernel.sizes[1]):
            return F.adaptive_avg_pool2d(x, (1, kernel.sizes[1]))
        cells = [x[..., w.low[j] - left : w.high[j] - left].mean((2, 3)) for j in range(*columns)]
        return torch.stack(cells, -1)[:, :, None]

    def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x, (top, left) = pieces[0], run.starts[0]
        parts = (band(x[:, :, h.low[i] - top : h.high[i] - top], left, run.columns) for i in range(*run.rows))
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return torch.cat(list(parts), 2)
        found = x.new_empty((*x.shape[:2], run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]))
        for place, part in enumerate(parts):
            found[:, :, place : place + 1] = part
        return found

    return call


# ---------------------------------------------------------------- data movement


def _reshape(kernel: Kernel, stage: Stage) -> Call:
    sizes, dims = [int(s) for s in stage.values[kernel.node].shape], kernel.dims
    assert dims is not None

    def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        wanted = list(sizes)
        wanted[dims[0]], wanted[dims[1]] = run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]
        y = pieces[0].reshape(wanted)
        return y if run.over >= 0 else y.clone(memory_format=torch.contiguous_format)

    return call


def _pad(kernel: Kernel, stage: Stage) -> Call:
    node, mode = kernel.node, padding_mode(kernel.node)
    given = bind(node).get("value")
    value = float(given) if isinstance(given, int | float) else 0.0
    sizes = kernel.reads[0][0].sizes
    sides = (kernel.before[1], kernel.sizes[1] - sizes[1] - kernel.before[1])
    sources = [_Table(padded_rows(node, axis, kernel.sizes[axis], sizes[axis], stage.values)) for axis in (0, 1)]

    def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x = pieces[0]
        if mode == "constant":
            (above, below), (before, after) = run.pads[0]
            for axis, (start, stop) in enumerate((run.rows, run.columns)):
                if sum(run.pads[0][axis]) >= stop - start:
                    x = x.narrow(2 + axis, 0, 0)  # all of it is padding
            return F.pad(x, (before, after, above, below), value=value) if above + below + before + after else x.clone()
        x = _picked(x, 2, sources[0], run.rows, run.starts[0][0])
        if run.columns == (0, kernel.sizes[1]) and min(sides) >= 0 and max(sides) and x.shape[3] == sizes[1]:
            return F.pad(x, (*sides, 0, 0), mode=mode)
        x = _picked(x, 3, sources[1], run.columns, run.starts[0][1])
        return x.clone() if x is pieces[0] else x

    return call


def _shuffle(kernel: Kernel) -> Call:
    node = kernel.node
    up = op_name(node) == "pixel_shuffle"
    ratio = int(bind(node)["upscale_factor" if up else "downscale_factor"])

    def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        if not up:
            return F.pixel_unshuffle(pieces[0], ratio)
        y = F.pixel_shuffle(pieces[0], ratio)
        top, left = (run.rows[0] - run.starts[0][0] * ratio, run.columns[0] - run.starts[0][1] * ratio)
        height, width = run.rows[1] - run.rows[0], run.columns[1] - run.columns[0]
        same = (height, width) == tuple(y.shape[2:])
        return y if same else y[:, :, top : top + height, left : left + width].clone()

    return call


class _Table:
    """Numbers for the rows of a map, kept as a tensor where pieces of it are wanted."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers
        self._kept: dict[Any, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, dtype: torch.dtype, span: tuple[int, int]) -> torch.Tensor:
        if isinstance(x, FakeTensor) or torch.compiler.is_exporting() or torch.compiler.is_compiling():
            return torch.as_tensor(self.numbers[slice(*span)], dtype=dtype, device=x.device)
        kept = self._kept.get((dtype, x.device))
        if kept is None:
            with torch.inference_mode(False):  # it will serve in training too
                kept = self._kept[dtype, x.device] = torch.as_tensor(self.numbers, dtype=dtype, device=x.device)
        return kept.narrow(0, span[0], span[1] - span[0])


def _picked(x: torch.Tensor, dim: int, table: _Table, span: tuple[int, int], start: int) -> torch.Tensor:
    """Rows of a piece whose first row is ``start``; the piece itself where they are all of it."""
    rows = table.numbers[slice(*span)]
    if len(rows) == x.shape[dim] and bool((rows == np.arange(start, start + len(rows))).all()):
        return x
    return x.index_select(dim, table(x, torch.int64, span) - start)


def _resize(kernel: Kernel, stage: Stage) -> Call:
    """Along rows by hand, each a weighted sum of few source rows; then along columns, by torch where all are there."""
    node, name = kernel.node, op_name(kernel.node)
    source = next(n for n in node.all_input_nodes if n in kernel.places)
    sizes = (stage.regions.rows(source, 0), stage.regions.rows(source, 1))
    dtype = stage.values[node].dtype
    found = [resize_taps(node, axis, kernel.sizes[axis], sizes[axis], dtype) for axis in (0, 1)]
    tables = [[(_Table(rows), _Table(share)) for rows, share in zip(*both, strict=True)] for both in found]
    scale, corners = resize_scale(node, 1), bool(bind(node).get("align_corners"))

    def columns(y: torch.Tensor) -> torch.Tensor:
        wanted = [y.shape[2], kernel.sizes[1]]  # as many rows as there are: torch leaves these alone
        return resized(name, y, wanted, corners, None, scale)

    def along(x: torch.Tensor, axis: int, span: tuple[int, int], start: int) -> torch.Tensor:
        if len(tables[axis]) == 1:
            return _picked(x, 2 + axis, tables[axis][0][0], span, start)
        form, total = (-1, 1) if axis == 0 else (-1,), None
        for rows, share in tables[axis]:
            part = x.index_select(2 + axis, rows(x, torch.int64, span) - start)
            factor = share(x, x.dtype, span).view(form)
            if torch.is_grad_enabled() or torch.compiler.is_exporting():
                total = part * factor if total is None else total + part * factor
            else:
                total = part.mul_(factor) if total is None else total.addcmul_(part, factor)
            del part  # before the next one is made
        assert total is not None
        return total

    def call(run: Run, pieces: Pieces, wholes: Pieces) -> torch.Tensor:
        x, starts = (pieces[0], run.starts[0]) if pieces else (wholes[0].to(dtype), (0, 0))
        y = along(x, 0, run.rows, starts[0])
        # ONNX has no nearest rows at a given scale that are not those of the sizes, and no nearest-exact ones.
        portable = "nearest" not in name or not torch.compiler.is_exporting()
        if portable and run.columns == (0, kernel.sizes[1]) and x.shape[3] == sizes[1]:
            y = columns(y)
        else:
            y = along(y, 1, run.columns, starts[1])
        return y.clone() if y is x else y

    return call
