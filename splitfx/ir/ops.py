"""The operation table: for each operation its spatial rule, its channel rule and what it costs per element.

Every analysis and every pass reads this table, so supporting an operator is one row. Both spellings of an
operation, module and aten overload, in place or not, share a row; `bind` reads their arguments under one set of
names. An operator without a row is `UNKNOWN`: a barrier that passes leave whole and name in their notes.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from splitfx.ir.graph import module_of
from splitfx.ir.layers import FunctionalBatchNorm
from splitfx.ir.schema import arguments, aten_name, mutates


class Spatial(enum.Enum):
    """What a row of output needs of the input's rows."""

    POINTWISE = "pointwise"  # the same row
    WINDOW = "window"  # rows under a kernel: conv, pool (see `window`)
    RESIZE = "resize"  # rows at a scale: interpolate, pixel shuffle
    GLOBAL = "global"  # every row: reductions over H and W, normalisation over H and W
    MOVE = "move"  # data movement: depends on its arguments
    UNKNOWN = "unknown"


class Channel(enum.Enum):
    """How the channels of the output follow from those of the inputs."""

    SAME = "same"  # channel i of every operand and of the output are one channel
    MIXES = "mixes"  # every output channel reads every input channel (of its group)
    MOVE = "move"  # concat, split, slice, flatten, view, transpose, shuffle: an index map
    UNIT = "unit"  # channels normalised together: the group of a GroupNorm
    CONTRACT = "contract"  # attention: channels of a head go together
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Op:
    """One row. ``per_output`` and ``per_input`` count elementwise operations (semantics B); None: cannot say."""

    name: str
    spatial: Spatial
    channel: Channel
    per_output: int | None = 0
    per_input: int = 0
    macs: bool = False  # multiply-accumulates are counted from the weight or the operands


def _rows(names: str, spatial: Spatial, channel: Channel, **cost: Any) -> dict[str, Op]:
    return {name: Op(name, spatial, channel, **cost) for name in names.split()}


TABLE: dict[str, Op] = {
    **_rows(
        "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d",
        Spatial.WINDOW,
        Channel.MIXES,
        macs=True,
    ),
    **_rows("linear", Spatial.POINTWISE, Channel.MIXES, macs=True),
    **_rows("batch_norm", Spatial.POINTWISE, Channel.SAME, per_output=2),
    **_rows(
        """relu relu6 hardtanh sigmoid silu gelu hardswish hardsigmoid tanh leaky_relu elu selu celu mish softplus
            clamp clamp_min clamp_max add sub rsub mul div true_divide pow neg abs exp log log2 sqrt rsqrt square erf
            sin cos round floor ceil sign softsign threshold log_sigmoid hardshrink softshrink minimum maximum where
            lt le gt ge eq ne logical_and logical_or logical_not masked_fill addcmul addcdiv lerp reciprocal prelu
            rrelu glu_gate""",
        Spatial.POINTWISE,
        Channel.SAME,
        per_output=1,
    ),
    **_rows(
        """dropout feature_dropout alpha_dropout feature_alpha_dropout leaf identity clone contiguous to _to_copy
            detach alias lift_fresh_copy type_as zeros_like ones_like fill zero""",
        Spatial.POINTWISE,
        Channel.SAME,
    ),
    **_rows(
        "max_pool1d max_pool2d max_pool3d max_pool2d_with_indices avg_pool1d avg_pool2d avg_pool3d",
        Spatial.WINDOW,
        Channel.SAME,
        per_input=1,
    ),
    **_rows(
        """adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d mean
            amax amin sum var std norm linalg_vector_norm var_mean""",
        Spatial.GLOBAL,
        Channel.SAME,
        per_input=1,
    ),
    **_rows("instance_norm", Spatial.GLOBAL, Channel.SAME, per_output=4),
    **_rows("group_norm", Spatial.GLOBAL, Channel.UNIT, per_output=4),
    **_rows("layer_norm rms_norm", Spatial.UNKNOWN, Channel.UNKNOWN, per_output=4),
    **_rows("softmax log_softmax", Spatial.UNKNOWN, Channel.UNKNOWN, per_output=3),
    **_rows(
        """upsample_nearest1d upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_nearest_exact2d
            upsample_linear1d""",
        Spatial.RESIZE,
        Channel.SAME,
        per_output=1,
    ),
    **_rows("pixel_shuffle pixel_unshuffle", Spatial.RESIZE, Channel.MOVE),
    **_rows("pad constant_pad_nd reflection_pad2d replication_pad2d", Spatial.MOVE, Channel.MOVE),
    **_rows("cat", Spatial.POINTWISE, Channel.MOVE),
    **_rows(
        """view _unsafe_view reshape flatten unflatten permute transpose t mT movedim swapaxes slice narrow select
            chunk split split_with_sizes unbind stack squeeze unsqueeze expand expand_as roll flip channel_shuffle
            index_select getitem repeat tile repeat_interleave numpy_T adjoint view_as tensor_split unsafe_chunk
            unsafe_split""",
        Spatial.MOVE,
        Channel.MOVE,
    ),
    **_rows("scaled_dot_product_attention", Spatial.UNKNOWN, Channel.CONTRACT, macs=True),
    **_rows("matmul bmm mm addmm baddbmm einsum", Spatial.UNKNOWN, Channel.UNKNOWN, macs=True),
    **_rows("tiled entry", Spatial.UNKNOWN, Channel.UNKNOWN),
    **_rows("embedding", Spatial.UNKNOWN, Channel.UNKNOWN),
    **_rows("cumsum topk sort argmax argsort gather index", Spatial.UNKNOWN, Channel.UNKNOWN, per_output=1),
    **_rows(
        "sym_size arange full zeros ones scalar_tensor new_zeros new_ones empty",
        Spatial.UNKNOWN,
        Channel.UNKNOWN,
    ),
}

UNKNOWN = Op("unknown", Spatial.UNKNOWN, Channel.UNKNOWN, per_output=None)
STRUCTURE = Op("structure", Spatial.UNKNOWN, Channel.UNKNOWN)  # placeholders, attributes, output, size arithmetic

_MODULES: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Linear: "linear",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    nn.BatchNorm3d: "batch_norm",
    nn.SyncBatchNorm: "batch_norm",
    nn.LayerNorm: "layer_norm",
    nn.RMSNorm: "rms_norm",
    nn.GroupNorm: "group_norm",
    nn.InstanceNorm1d: "instance_norm",
    nn.InstanceNorm2d: "instance_norm",
    nn.InstanceNorm3d: "instance_norm",
    nn.PReLU: "prelu",
    nn.Embedding: "embedding",
    nn.Identity: "identity",
    nn.Dropout: "dropout",
    nn.Dropout1d: "feature_dropout",
    nn.Dropout2d: "feature_dropout",
    nn.Dropout3d: "feature_dropout",
    nn.AlphaDropout: "alpha_dropout",
    nn.FeatureAlphaDropout: "feature_alpha_dropout",
    FunctionalBatchNorm: "batch_norm",
}
_PER_CHANNEL = ("batch_norm", "instance_norm", "group_norm", "prelu")


def op_name(node: fx.Node) -> str:
    """The table name of a node's operation; empty for structure and for what has no aten name."""
    if node.op == "call_module":
        kind = type(module_of(node))
        # A module of another class in a canonical graph is a train-dependent leaf, one tensor in and one out; one that
        # a pass made says what it is.
        return _MODULES.get(kind) or getattr(kind, "op_name", "leaf")  # type: ignore[arg-type]
    if node.op != "call_function":
        return ""
    if getattr(node.target, "__name__", "") == "getitem":
        return "getitem"
    return aten_name(node.target)


def op(node: fx.Node) -> Op:
    """The row of a node's operation; `UNKNOWN` where the table has none."""
    if node.op in ("placeholder", "get_attr", "output") or is_size(node):
        return STRUCTURE
    row = TABLE.get(op_name(node), UNKNOWN)
    if row.name in _PER_CHANNEL and len(node.all_input_nodes) > 1:
        return replace(row, channel=Channel.UNKNOWN)  # its per-channel values are computed: no module to narrow
    return row


def is_size(node: fx.Node) -> bool:
    """Arithmetic on sizes (dynamic batch), which moves no tensor."""
    if node.op != "call_function":
        return False
    if node.target in (torch.ops.aten.sym_size.int, torch.sym_max, torch.sym_min, torch.sym_sqrt, torch.sym_float):
        return True
    name = getattr(node.target, "__name__", "")
    return getattr(node.target, "__module__", "") in ("_operator", "math") and name != "getitem"


def in_place(node: fx.Node) -> bool:
    """The node overwrites its first operand."""
    if node.op == "call_function":
        return mutates(node.target)
    return bool(getattr(module_of(node), "inplace", False))


def out_of_place(target: Any) -> Any:
    """The functional twin of an in-place aten overload; other targets as they are."""
    if not mutates(target):
        return target
    packet = getattr(torch.ops.aten, aten_name(target))
    return getattr(packet, target._overloadname)


_MODULE_FIELDS = (
    "stride",
    "padding",
    "dilation",
    "groups",
    "output_padding",
    "eps",
    "momentum",
    "num_groups",
    "normalized_shape",
    "p",
    "running_mean",
    "running_var",
)


_TO_THE_END = 2**62  # x[:] slices up to the largest integer


def slices_all(node: fx.Node) -> bool:
    """A slice over a whole axis, whatever its size: ``x[:]``."""
    given = bind(node)
    if op_name(node) != "slice" or given["start"] not in (None, 0) or given["step"] != 1:
        return False
    end = given["end"]
    return end is None or (isinstance(end, int) and end >= _TO_THE_END)


def bind(node: fx.Node, values: Mapping[fx.Node, Any] | None = None) -> dict[str, Any]:
    """A node's arguments by aten schema name, the same for both spellings; the data operand is ``input``.

    ``weight`` and ``bias`` are tensors where a module holds them, nodes where the graph computes them. With ``values``
    (of all nodes, at one size of the inputs) arguments that follow from sizes are the numbers that they are there.
    """
    if values is not None:
        return map_arg(bind(node), lambda n: values[n] if is_size(n) else n)  # type: ignore[return-value]
    if node.op == "call_function":
        if not hasattr(node.target, "_schema"):
            return {"input": node.args[0], "args": node.args[1:]}
        found = arguments(node)
        if "self" in found:
            found["input"] = found.pop("self")
        return found
    module = module_of(node)
    assert module is not None, f"{node.op} {node.name} calls nothing"
    found = {name: getattr(module, name) for name in _MODULE_FIELDS if hasattr(module, name)}
    found |= {name: getattr(module, name, None) for name in ("weight", "bias")}
    return {"input": node.args[0], **found}


@dataclass(frozen=True)
class Window:
    """A sliding window per spatial axis: all tuples have one entry per axis, H before W."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    padding_end: tuple[int, ...]
    dilation: tuple[int, ...]
    ceil_mode: bool = False
    transposed: bool = False


def _per_axis(value: Any, axes: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * axes
    values = tuple(int(v) for v in value)
    return values * axes if len(values) == 1 else values


def window(node: fx.Node, axes: int = 2, weight_shape: tuple[int, ...] = ()) -> Window:
    """The window of a conv or pool node; ``weight_shape`` for a conv whose weight the graph computes."""
    a, name = bind(node), op_name(node)
    if "pool" in name:
        kernel = _per_axis(a["kernel_size"], axes)
        stride = _per_axis(a["stride"], axes) if a["stride"] else kernel
        padding, dilation = _per_axis(a["padding"], axes), _per_axis(a.get("dilation") or 1, axes)
        return Window(kernel, stride, padding, padding, dilation, bool(a.get("ceil_mode")))
    weight = a["weight"].shape if isinstance(a["weight"], torch.Tensor) else weight_shape
    kernel = tuple(int(k) for k in weight[2:])
    stride, dilation = _per_axis(a["stride"], axes), _per_axis(a["dilation"], axes)
    before, after = _conv_padding(a["padding"], kernel, dilation)
    return Window(kernel, stride, before, after, dilation, transposed="transpose" in name)


def _conv_padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    if padding == "valid":
        return (0,) * len(kernel), (0,) * len(kernel)
    if padding == "same":
        total = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(t // 2 for t in total), tuple(t - t // 2 for t in total)
    return (_per_axis(padding, len(kernel)),) * 2


# ---------------------------------------------------------------- text form


def text(graph: fx.GraphModule) -> str:
    """The graph as text, one node a line: what it is, whom it reads, what it calls with which options."""
    return "\n".join(describe(node) for node in graph.graph.nodes if node.op != "get_attr" or node.users) + "\n"


def describe(node: fx.Node) -> str:
    """One node as one line: ``%conv1 = conv2d[3->64 7x7 stride 2 pad 3] "conv1" (%x)``."""
    reads = ", ".join(_word(a) for a in node.args if not _is_option(a))
    if node.op == "output":
        return f"return {_word(node.args[0])}"
    if node.op == "placeholder":
        return f"%{node.name} = input"
    if node.op == "get_attr":
        return f'%{node.name} = value "{node.target}"'
    if node.op == "call_module":
        return f'%{node.name} = {_module_words(module_of(node), op_name(node))} "{node.target}" ({reads})'
    options = [str(a) for a in node.args if _is_option(a)] + [f"{k}={_word(v)}" for k, v in node.kwargs.items()]
    name = op_name(node) or getattr(node.target, "__name__", str(node.target))
    words = f"[{' '.join(options)}]" if options else ""
    return f"%{node.name} = {name}{'_' if in_place(node) else ''}{words} ({reads})"


def _is_option(value: Any) -> bool:
    nodes: list[fx.Node] = []
    map_arg(value, nodes.append)
    return not nodes


def _word(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_word(v) for v in value) + "]"
    return str(value)


def _module_words(module: nn.Module | None, name: str) -> str:
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        words = [f"{module.in_channels}->{module.out_channels}", "x".join(map(str, module.kernel_size))]
        words += [
            f"{k} {_short(getattr(module, a))}"
            for k, a, plain in (
                ("stride", "stride", 1),
                ("pad", "padding", 0),
                ("dilation", "dilation", 1),
                ("groups", "groups", 1),
            )
            if _short(getattr(module, a)) != str(plain)
        ]
        return f"{name}[{' '.join(words)}]"
    if isinstance(module, nn.Linear):
        return f"{name}[{module.in_features}->{module.out_features}]"
    if name == "leaf":
        return type(module).__name__
    size = next((getattr(module, a) for a in ("num_features", "num_channels", "p") if hasattr(module, a)), None)
    return f"{name}[{size}]" if size is not None else name


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))
    return str(value)
