"""Operations that torch's exporter translates wrongly, or not at all, written as ones that it translates rightly.

Does: rewrites these operations of an exported program, plain or in a tiled stage, before it becomes ONNX.
Refuses resizes with antialiasing under torch 2.11, which loses their weights on the way. What is still wrong behind it
is seen by `agreement`.
Promises: the program computes what it did; one without such an operation is not touched.

- Average pools with a divisor of their own: the exporter drops the divisor.
- Adaptive pools that do not divide, maxima and those over three axes: only those with cells of one size have a form.
- Resizes with antialiasing: onnxruntime's weights are others with `align_corners`, or when a scale is given. Each is a
  product with a constant matrix per axis, which torch itself is asked for.
- The random leaky ReLU, which has no form: in eval mode its slope is the middle one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._export.verifier import SpecViolationError
from torch.utils._python_dispatch import _disable_current_modes

from splitfx.errors import ExportError
from splitfx.ir.ops import ROWS
from splitfx.ir.schema import qualified_name

aten = torch.ops.aten


def rewritten(exported: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with the operations of `TABLE` replaced, where it has one."""
    found = {node.target: _written_as(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    found = {target: call for target, call in found.items() if call is not None}
    if not found:
        return exported
    try:
        return exported.run_decompositions(found)
    except SpecViolationError as error:  # torch 2.11 loses a constant that a rewrite makes
        names = ", ".join(sorted(str(target) for target in found))
        raise ExportError(
            f"torch {torch.__version__} loses a table on the way to ONNX, for one of {names}: use a newer torch."
        ) from error


def _written_as(target: Any) -> Callable[..., Any] | None:
    registered = ROWS.get(qualified_name(target))
    return TABLE.get(target) or (registered.decomposition if registered is not None else None)


def _average_pool(pool: Any, axes: int) -> Callable[..., Any]:
    def call(
        x: torch.Tensor,
        kernel_size: Sequence[int],
        stride: Sequence[int] = (),
        padding: Sequence[int] = (0,),
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        if divisor_override is None:
            return NotImplemented
        kernel, padding = _each(kernel_size, axes), _each(padding, axes)
        stride = _each(stride or kernel, axes)
        sides: list[int] = []
        for size, k, s, p in zip(x.shape[-axes:], kernel, stride, padding, strict=True):
            sides = [p, max(p, (_windows(size, k, s, p, ceil_mode) - 1) * s + k - size - p), *sides]
        mean = pool(aten.constant_pad_nd(x, sides), kernel, stride)
        return mean * (math.prod(kernel) / divisor_override)

    return call


def _windows(size: int, kernel: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """How many windows torch places: the last one has to start on the map or on the padding before it."""
    span = size + 2 * padding - kernel
    count = -(-span // stride) + 1 if ceil_mode else span // stride + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


def _adaptive_max_pool(axes: int) -> Callable[..., Any]:
    """Axis after axis, with the place of each maximum."""

    def call(x: torch.Tensor, output_size: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        sizes = x.shape[-axes:]
        place = torch.zeros_like(x, dtype=torch.int64)
        for axis, count in enumerate(_each(output_size, axes)):
            dim, size = axis - axes, sizes[axis]
            values, places = [], []
            for low, high in _cells(size, count):
                best, where = x.narrow(dim, low, high - low).max(dim, keepdim=True)
                values.append(best)
                places.append(place.narrow(dim, low, high - low).gather(dim, where) * size + where + low)
            x, place = torch.cat(values, dim), torch.cat(places, dim)
        return x, place  # the axes were met in order: row-major

    return call


def _adaptive_mean(axes: int) -> Callable[..., Any]:
    def call(x: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
        for dim, count in zip(range(-axes, 0), _each(output_size, axes), strict=True):
            parts = (
                x.narrow(dim, low, high - low).mean(dim, keepdim=True) for low, high in _cells(x.shape[dim], count)
            )
            x = torch.cat(list(parts), dim)
        return x

    return call


def _cells(size: int, count: int) -> list[tuple[int, int]]:
    """Where the cells of an adaptive pool begin and end."""
    return [(i * size // count, -(-(i + 1) * size // count)) for i in range(count)]


def _smooth_resize(resize: Any) -> Callable[..., Any]:
    def call(
        x: torch.Tensor,
        output_size: Sequence[int],
        align_corners: bool,
        scales_h: float | None = None,
        scales_w: float | None = None,
    ) -> torch.Tensor:
        for dim, out, scale in ((-2, output_size[0], scales_h), (-1, output_size[1], scales_w)):
            size = int(x.shape[dim])
            with _disable_current_modes():
                eye = torch.eye(size, dtype=torch.float64)[None, None]
                weights = resize(eye, [int(out), size], align_corners, scale, None)[0, 0].tolist()
            matrix = torch.tensor(weights, dtype=x.dtype, device=x.device)
            x = matrix @ x if dim == -2 else x @ matrix.t()
        return x

    return call


def _smooth_resize_by(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The overload that takes a size or factors."""

    def call(
        x: torch.Tensor, output_size: Sequence[int] | None, align_corners: bool, factors: Sequence[float] | None
    ) -> torch.Tensor:
        if output_size is not None or factors is None:
            return rule(x, output_size, align_corners)
        sizes = [int(size * by) for size, by in zip(x.shape[2:], factors, strict=True)]
        return rule(x, sizes, align_corners, *factors)

    return call


def _middle_slope(
    x: torch.Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> Any:
    return NotImplemented if training else aten.leaky_relu(x, (lower + upper) / 2)


def _each(value: int | Sequence[int], axes: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values


_bilinear = _smooth_resize(aten._upsample_bilinear2d_aa.default)
_bicubic = _smooth_resize(aten._upsample_bicubic2d_aa.default)
TABLE: dict[Any, Callable[..., Any]] = {
    aten.avg_pool2d.default: _average_pool(aten.avg_pool2d.default, 2),
    aten.avg_pool3d.default: _average_pool(aten.avg_pool3d.default, 3),
    aten.adaptive_max_pool1d.default: _adaptive_max_pool(1),
    aten.adaptive_max_pool2d.default: _adaptive_max_pool(2),
    aten.adaptive_max_pool3d.default: _adaptive_max_pool(3),
    aten.adaptive_avg_pool3d.default: _adaptive_mean(3),
    aten._adaptive_avg_pool3d.default: _adaptive_mean(3),
    aten._upsample_bilinear2d_aa.default: _bilinear,
    aten._upsample_bilinear2d_aa.vec: _smooth_resize_by(_bilinear),
    aten._upsample_bicubic2d_aa.default: _bicubic,
    aten._upsample_bicubic2d_aa.vec: _smooth_resize_by(_bicubic),
    aten.rrelu.default: _middle_slope,
}
