"""Which functions a stored program may run, and with which arguments.

Does: lists the operators that may be in a stored program: those of the operation table, and what else traces hold.
Refuses everything else, and of these the overloads that write to more than their first operand, or that return no
tensor; arguments that an operator of torch does not check itself before it reads or writes by them.
Promises: what passes here reads and writes its operands only, draws no random seed, prints nothing and opens no file.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch

from splitfx.ir.ops import ROWS
from splitfx.ir.schema import FUNCTION_NAMES, aten_name, qualified_name

_BESIDE_THE_TABLE = """
    acos acosh addbmm addmv addr affine_grid_generator all aminmax angle any argmin asin asinh atan atan2 atanh
    adaptive_max_pool3d bilinear bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
    bitwise_xor broadcast_tensors broadcast_to cdist col2im column_stack complex concat copy copysign cosh
    cosine_similarity count_nonzero cross cummax cummin cumprod deg2rad diag_embed diagonal dot dstack einsum
    erfc erfinv exp2 expm1 eye fft_fft fft_fft2 fft_fftn fft_fftshift fft_ifft fft_ifft2 fft_ifftn fft_ifftshift
    fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftn floor_divide fmax fmin fmod frac full_like glu
    grid_sampler gru gru_cell heaviside hstack hypot im2col imag index_add index_copy index_fill index_put
    isfinite isinf isnan kron ldexp lgamma linalg_cross linalg_matrix_norm linalg_norm linalg_vecdot linspace
    log10 log1p logaddexp logaddexp2 logcumsumexp logical_xor logit logsumexp lstm lstm_cell mH masked_scatter
    max max_pool3d_with_indices median meshgrid min moveaxis mv nan_to_num nanmean nansum new_full one_hot outer
    pairwise_distance polar positive prod rad2deg real reflection_pad1d reflection_pad3d relu remainder
    replication_pad1d replication_pad3d reshape_as resolve_conj resolve_neg rnn_relu rnn_tanh rot90 scatter
    scatter_add scatter_reduce select_scatter sgn sinc sinh slice_scatter squeeze_copy std_mean swapdims
    sym_numel take_along_dim tan tensordot tril tril_indices triu triu_indices trunc unfold upsample_nearest3d
    upsample_trilinear3d _upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact1d
    _upsample_nearest_exact3d view_as_complex view_as_real vstack _weight_norm xlogy
"""
ALLOWED = frozenset({*(name for name, row in ROWS.items() if row.stored), *_BESIDE_THE_TABLE.split()})
_SIZES = ("sym_size", "sym_numel")

LARGEST = 2**40  # a size, an index, a number of anything
_WINDOW = 2**16  # rows of a window: larger ones overflow where torch multiplies them
_WINDOWS = ("kernel_size", "stride", "padding", "dilation", "output_padding", "upscale_factor", "downscale_factor")
_SCALES = ("scales", "scales_d", "scales_h", "scales_w", "scale_factors")
_POWER = 64
_MOST_PARTS = 10_000


def refusal(target: Any) -> str:
    """Why a function cannot be in a stored program; "" if it can."""
    if not isinstance(target, torch._ops.OpOverload):
        return "" if target in FUNCTION_NAMES else "is not an operator of torch"
    registered = ROWS.get(qualified_name(target))  # by this process, never by the folder
    if registered is None and aten_name(target) not in ALLOWED:
        return "is not an operator that a stored program may hold"
    schema = target._schema
    if any(one.alias_info is not None and one.alias_info.is_write for one in schema.arguments[1:]):
        return "writes to more than its operand"
    if aten_name(target) in _SIZES:
        return ""
    returns = {str(one.type) for one in schema.returns}
    return "" if returns and returns <= {"Tensor", "List[Tensor]"} else "gives no tensor"


def unfit(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """What is wrong with the arguments of a function that may be run, as far as torch does not say it itself."""
    if not isinstance(target, torch._ops.OpOverload):
        return _unfit_python(target, args)
    schema = target._schema.arguments
    arguments = {**{spec.name: one for spec, one in zip(schema, args, strict=False)}, **kwargs}
    scalars = {spec.name for spec in schema if "number" in str(spec.type)}
    for name, value in arguments.items():
        for one in _leaves(value):
            if not _is_bounded(name, one, name in scalars):
                return f"{name} is {str(one)[:40]}"
    check = _CHECKS.get(aten_name(target))
    return check(arguments) if check is not None else ""


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _leaves(one)
    else:
        yield value


def _is_bounded(name: str, one: Any, scalar: bool) -> bool:
    if isinstance(one, str):
        return len(one) <= 100
    if name in _SCALES:  # torch turns positions times these into whole numbers, unchecked
        return one is None or (isinstance(one, int | float) and 1e-6 <= one <= 1e6)
    if not isinstance(one, int) or isinstance(one, bool):
        return True
    if scalar or name == "end":  # the end of a slice that goes on is the largest of all numbers
        return abs(one) <= 2**63
    return abs(one) <= (_WINDOW if name in _WINDOWS else LARGEST)


def _unfit_python(target: Any, args: tuple[Any, ...]) -> str:
    """Python's own operators reckon with sizes; of lists and words they would make others as long as they like."""
    numbers = args[1:] if target is operator.getitem else args
    if not all(isinstance(one, int | float | torch.Tensor | torch.SymInt | torch.SymFloat) for one in numbers):
        return "" if target is operator.getitem else "it reckons with something else than numbers"
    if target is operator.pow and not all(isinstance(one, int | float) and abs(one) <= _POWER for one in args[1:]):
        return f"powers are up to {_POWER}"
    return ""


# ---------------------------------------------------------------- what torch does not check


def _attention(arguments: dict[str, Any]) -> str:
    key, value = arguments["key"], arguments["value"]
    same = key.shape[-2] == value.shape[-2] and key.shape[-1] == arguments["query"].shape[-1]
    return "" if same else "keys and values differ in size"


def _grid(arguments: dict[str, Any]) -> str:
    known = arguments["interpolation_mode"] in (0, 1, 2) and arguments["padding_mode"] in (0, 1, 2)
    return "" if known else "an unknown mode"


def _parts(arguments: dict[str, Any]) -> str:
    """Every part is a tensor of its own, made before anybody could look at how many there are."""
    x = arguments["self"] if "self" in arguments else arguments["input"]
    along = x.shape[arguments.get("dim", 0)] if x.dim() else 1
    size = next(
        (arguments[name] for name in ("split_size", "chunks", "sections") if isinstance(arguments.get(name), int)), 1
    )
    count = -(-along // max(1, size)) if "split_size" in arguments else size if size != 1 else along
    return "" if count <= _MOST_PARTS else f"{count} parts"


def _steps(arguments: dict[str, Any]) -> str:
    """Recurrent layers are unrolled, step by step."""
    x = arguments["input"]
    return "" if x.dim() != 3 or max(x.shape[:2]) * arguments["num_layers"] <= _MOST_PARTS else "a sequence without end"


def _lstm(arguments: dict[str, Any]) -> str:
    """Sizes of states and weights against those of the input: the fast kernels take them on trust."""
    if "batch_sizes" in arguments:
        return "packed sequences"
    if _steps(arguments):
        return _steps(arguments)
    x, (h, c), weights = arguments["input"], arguments["hx"], list(arguments["params"])
    ways, layers, size = 1 + bool(arguments["bidirectional"]), arguments["num_layers"], h.shape[-1]
    batch = x.shape[0 if arguments["batch_first"] else 1]
    wanted: list[tuple[int, ...]] = []
    for layer in range(min(layers, len(weights))):
        reads = x.shape[-1] if layer == 0 else size * ways
        one = [(4 * size, reads), (4 * size, size), *([(4 * size,), (4 * size,)] if arguments["has_biases"] else [])]
        wanted += one * ways
    state = (layers * ways, batch, size)
    fits = tuple(h.shape) == tuple(c.shape) == state and [tuple(w.shape) for w in weights] == wanted
    return "" if x.dim() == 3 and fits else "the sizes of its states or weights do not fit"


_CHECKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "scaled_dot_product_attention": _attention,
    "grid_sampler": _grid,
    "lstm": _lstm,
    **dict.fromkeys(("gru", "rnn_tanh", "rnn_relu"), _steps),
    **dict.fromkeys(("unbind", "split", "chunk", "unsafe_chunk", "unsafe_split", "tensor_split"), _parts),
}
