"""The row of an operation: all that splitfx knows of it, in one place.

A row says how the operation is spelled (module classes; aten or custom operators bear its name), what a row of its
output needs of its input's rows, how its channels follow from those of its inputs, what it costs, and, where that is
not simply a call of the operation itself, how its layer is narrowed to some channels and how a piece of its output is
computed. Every analysis and every pass reads rows; no list of names is kept anywhere else.

An operation without a row is `UNKNOWN`: a barrier that passes leave whole and name in their notes.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import fx, nn

if TYPE_CHECKING:
    from splitfx.ir.ops.pieces import Call, Job, Span

Bound = Mapping[str, Any]  # a node's arguments by name, see `bind`
Sizes = Callable[[Any], tuple[int, ...]]  # of a node's value, or of a tensor
# Where the rows and the columns of a map lie. Twice the same axis: rows there are groups of as many places as there are
# columns, one behind the other, as in tokens [N, H * W, C]; a sequence [N, C, L] has one column.
Dims = tuple[int, ...]


class Laid(tuple[int, ...]):
    """Dims of a result, with its rows and columns where they do not follow from its sizes. ``across``: every column of
    it follows from all columns, so it is computed in full rows."""

    extent: tuple[int, int] | None
    across: bool

    def __new__(cls, dims: Dims, extent: tuple[int, int] | None = None, across: bool = False) -> Laid:
        made = super().__new__(cls, dims)
        made.extent, made.across = extent, across
        return made


class Spatial(enum.Enum):
    """What a row of output needs of the input's rows."""

    POINTWISE = "pointwise"  # the same row
    WINDOW = "window"  # rows under a kernel: conv, pool (see `Window`)
    RESIZE = "resize"  # rows at a scale: interpolate, pixel shuffle
    PAD = "pad"  # rows between new ones at both ends
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


class Result(enum.Enum):
    """What a result is beside its operand."""

    NEW = "new"
    OPERAND = "operand"  # the operand itself, in eval mode
    ALIAS = "alias"  # the operand's numbers, perhaps in its memory
    CLONE = "clone"  # the operand's numbers, in memory of their own
    VIEW = "view"  # other sizes or another order, or another type; may lie in the operand's memory
    PARTS = "parts"  # a tuple of parts of the operand, cut along a dim

    @property
    def renames(self) -> bool:
        """The result is the operand's numbers as they lie."""
        return self in (Result.OPERAND, Result.ALIAS, Result.CLONE)

    @property
    def may_share(self) -> bool:
        """The result may lie in the operand's memory."""
        return self in (Result.OPERAND, Result.ALIAS, Result.VIEW)


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

    def with_column(self) -> Window:
        """The window of a sequence as one of a map with a single column."""
        rest = {"kernel": 1, "stride": 1, "padding": 0, "padding_end": 0, "dilation": 1}
        return replace(self, **{name: (*getattr(self, name)[:1], one) for name, one in rest.items()})

    @staticmethod
    def of(size: int, stride: int = 1, padding: int = 0, dilation: int = 1, axes: int = 2) -> Window:
        """The same along all axes, padded alike on both sides."""
        each = [(one,) * axes for one in (size, stride, padding, padding, dilation)]
        return Window(each[0], each[1], each[2], each[3], each[4])


@dataclass(frozen=True)
class At:
    """One axis of one node: ``count`` rows of its output follow from ``size`` rows of its operand. ``axes``: how many
    spatial axes there are; ``values``: of all nodes, at these sizes."""

    node: fx.Node
    axis: int
    axes: int
    count: int
    size: int
    values: Mapping[fx.Node, Any]
    window: Window | None = None
    dims: Dims | None = None  # of the operand

    @property
    def rows(self) -> np.ndarray:
        """The rows of the output, by number."""
        return np.arange(self.count)


# (first operand row, one past the last) of every output row; may lie outside the map, where the padding is.
Taps = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Placed:
    """A node whose first map has its spatial axes at ``dims``; sizes are those of its operand and of its result."""

    node: fx.Node
    bound: Bound
    dims: Dims
    given: tuple[int, ...]
    sizes: tuple[int, ...]
    operand: fx.Node
    values: Mapping[fx.Node, Any]
    together: bool  # all operands are maps whose axes lie there
    extent: tuple[int, int] = (0, 0)  # rows and columns of the first map
    where: Mapping[fx.Node, Dims | None] = field(default_factory=dict)  # the axes of all values so far
    extents: Mapping[fx.Node, tuple[int, int]] = field(default_factory=dict)

    @property
    def joined(self) -> bool:
        """Rows and columns lie in one axis."""
        return self.dims[0] == self.dims[1]

    @property
    def rank(self) -> int:
        return len(self.given)

    @property
    def channels_first(self) -> bool:
        """The rows and columns are what lies behind the channels; a volume has one more axis behind them."""
        return self.dims in ((2, 3), (2, 2))

    def outside(self, mixed: Iterable[int]) -> Dims | None:
        """The axes where they are, if the operation does not mix rows."""
        lost = {d % self.rank for d in mixed}
        if self.dims[0] in lost:
            return None
        return Laid(self.dims, across=True) if self.dims[1] in lost else self.dims


@dataclass(frozen=True)
class Layer:
    """How a module with something per channel is made narrower and wider. ``narrow(module, positions)``: the module on
    the channels at these positions, in this order; ``widen(module, places)``: with channels more, at the places that
    are -1, which give zero for zero. ``held``: whether it holds anything per channel; ``fits``: whether it can run on
    these channels alone."""

    narrow: Callable[[Any, np.ndarray], nn.Module]
    widen: Callable[[Any, np.ndarray], nn.Module] | None = None
    held: Callable[[Any], bool] = lambda module: True
    fits: Callable[[Any, np.ndarray], bool] = lambda module, positions: True


@dataclass(frozen=True)
class Raised:
    """How an operator whose weights are parameters becomes a layer again: ``recipe(arguments, weight)`` gives the class
    and its options, None for a call that no layer makes. ``tensors``: the arguments that the layer holds."""

    recipe: Callable[[Bound, torch.Tensor], tuple[type[nn.Module], dict[str, Any]] | None]
    tensors: tuple[str, ...] = ("weight", "bias")
    optional_bias: bool = False  # the class has a switch for it
    data: str = "input"


class CannotCount(Exception):
    """Carries the reason to `splitfx.analysis.cost`."""


Macs = Callable[[Bound, Sizes, int], int]  # (arguments, sizes of a value, elements of the result) -> how many
Reduction = Literal["", "sum", "mean", "max", "min", "moments", "deviation", "norm", "exponentials", "product"]


@dataclass(frozen=True, kw_only=True)
class Op:
    """One row. ``per_output`` and ``per_input`` count elementwise operations (semantics B); None: cannot say.

    ``follows``: where the spatial axes lie in its result, None where it does not leave every row by itself;
    ``refuses``: why no piece of this call can be computed; ``taps``: the rows that it reads; ``taken``: the maps that
    any piece reads whole. ``reduces``: how it takes a map in row by row, ``consumes``: why this call cannot, ``over``:
    the dims that it reduces, of so many. ``first_part``: of its parts only the first is computed. ``per_channel``:
    arguments that hold one value per
    channel. ``relabels``: the channels of its result as labels, from those of its operand (data movement). ``piece``
    computes a piece of its output; without one the operation is called on pieces as it is. ``workspace``: bytes that
    the piece allocates beside its operands and result. ``draws``: its result may be random.
    """

    name: str
    spatial: Spatial = Spatial.UNKNOWN
    channel: Channel = Channel.UNKNOWN
    per_output: int | None = 0
    per_input: int = 0
    macs: Macs | None = None
    biased: Callable[[Bound], bool] = lambda bound: bound.get("bias") is not None
    modules: tuple[type[nn.Module], ...] = ()
    result: Result = Result.NEW
    reduces: Reduction = ""
    draws: bool = False
    activates: bool = False
    normalizes: bool = False  # channels, by statistics of the batch, the map or a group
    keeps_output: bool = True  # autograd keeps the result for the backward pass
    drops: bool = False  # a dropout: acts in train mode, or where it is told to
    commutes: bool = False  # of two operands either may be overwritten
    joins_channels: bool = False  # several channels of the operand make one of the result
    keeps_channels: bool = False  # along a dim that is none of channels
    reshapes: bool = False  # to a given size; a piece of rows is one
    stored: bool = True  # may stand in a stored program
    like_operand: bool = False  # one kernel in eval mode, whose result is as large as its operand
    regroups: bool = False  # regroups positions in order: the sizes before and after say all
    first_part: bool = False
    turns: bool = False  # a piece of the channels is moved as the whole is, by the same arguments
    relays: bool = False  # lays channels anew
    sized: bool = False  # its second argument is a size for every dim
    channel_dim: int = 1  # where a MIXES operation has its channels
    per_channel: tuple[str, ...] = ()
    window: Callable[[Bound, int, tuple[int, ...]], Window] | None = None
    follows: Callable[[Placed], Dims | None] | None = None
    refuses: Callable[[Placed], str] | None = None
    taps: Callable[[At], Taps] | None = None
    consumes: Callable[[Placed], str] | None = None
    over: Callable[[Bound, int], set[int]] | None = None
    taken: Callable[[Placed], Sequence[fx.Node]] | None = None
    wraps: Callable[[Placed], bool] | None = None  # reads columns from the other end of their row
    relabels: Callable[[fx.Node, torch.Tensor, tuple[int, ...]], torch.Tensor | None] | None = None
    piece: Callable[[Job], Call] | None = None
    workspace: Callable[[Job, Span], int] | None = None
    layer: Layer | None = None
    raised: Raised | None = None
    decomposition: Callable[..., Any] | None = None  # the same in aten operators, for exports

    @property
    def axes(self) -> int:
        """The spatial axes that its name counts, such as 2 of max_pool2d; 0 for as many as its operand has."""
        counted = re.search(r"(\d)d(_|$)", self.name)
        return int(counted[1]) if counted and self.spatial in (Spatial.WINDOW, Spatial.RESIZE, Spatial.GLOBAL) else 0

    @property
    def convolves(self) -> bool:
        """A convolution, transposed or not, of any number of axes."""
        return self.spatial is Spatial.WINDOW and self.channel is Channel.MIXES

    @property
    def pools(self) -> bool:
        """A pool over windows, or over the map to a fixed size."""
        return self.channel is Channel.SAME and (
            self.spatial is Spatial.WINDOW or (self.spatial is Spatial.GLOBAL and "pool" in self.name)
        )


UNKNOWN = Op(name="unknown", per_output=None)
STRUCTURE = Op(name="structure")  # placeholders, attributes, output, size arithmetic

ROWS: dict[str, Op] = {}
BY_MODULE: dict[type, Op] = {}


def rows(names: str, *, modules: Mapping[str, Sequence[type[nn.Module]]] | None = None, **known: Any) -> None:
    """Add one row for each of the names; ``modules`` are the classes that spell them."""
    for name in names.split():
        add(Op(name=name, modules=tuple((modules or {}).get(name, ())), **known))


def add(row: Op) -> None:
    if row.name in ROWS:
        raise ValueError(f"{row.name} has two rows")
    ROWS[row.name] = row
    BY_MODULE.update(dict.fromkeys(row.modules, row))
