"""Kernels, one for each value of a stage, and the stage that they make up; what each of them may overwrite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from splitfx.analysis.regions import NCHW, Edge, Regions
from splitfx.ground.exclusive import kept
from splitfx.ir.graph import module_of
from splitfx.ir.ops import Op, Spatial, Window, bind, op, op_name
from splitfx.ir.ops.pieces import Job, Read
from splitfx.ir.ops.row import Dims
from splitfx.tiling.stage.roles import Kind

Spill = Literal["", "host", "disk"]


@dataclass(frozen=True)
class Keeping:
    """What becomes of maps that wait behind a phase for later ones, in bytes: of more than ``recompute`` those that are
    cheapest to make again are; of what is still more than ``spill`` the largest go to ``to`` meanwhile: "host", the
    memory beside a GPU, or "disk"."""

    recompute: float = float("inf")
    spill: float = float("inf")
    to: Spill = ""


KEEP_ALL = Keeping()


@dataclass(eq=False)
class Kernel:
    """One value of a stage and how it is computed. ``reads`` are the values it takes pieces of, with the edges of
    both axes; ``takes`` the values that it reads whole. ``role`` is "statistics" or "apply" for the two halves of a
    norm over H and W, else empty."""

    index: int
    node: fx.Node
    kind: Kind
    dims: Dims | None
    sizes: tuple[int, int]  # rows and columns of the value; of the map that a reduction consumes
    row_bytes: int  # bytes of one full row; of the whole value where there are no rows
    role: str = ""
    reads: list[tuple[Kernel, Edge, Edge]] = field(default_factory=list, repr=False)
    takes: list[Kernel] = field(default_factory=list, repr=False)
    users: list[tuple[Kernel, Edge, Edge]] = field(default_factory=list, repr=False)
    takers: list[Kernel] = field(default_factory=list, repr=False)  # that take it whole
    home: int = -1  # place of its memory, among those that hold all rows of a value: outputs first
    spilled: Spill = ""  # where that memory lies, for later phases; "": beside all others
    plain: bool = False  # called on pieces as it is, whatever its row says of windows
    lies_in: Kernel | None = None  # a value that runs once and is a view of this one
    temporary_bytes: int = 0  # what an operation that is made of others allocates and frees, for the whole value
    total_bytes: int = 0  # of the running totals of a reduction, in float64
    phase: int = 0
    group: int = 0  # fire at the same steps
    part: int = 0  # fire one part after the other: between two parts lies a single value
    exit: int = -1  # position among the stage's outputs
    macs_per_row: float = 0.0
    again: bool = False  # a second run of a kernel of an earlier phase
    rule: Window | None = None
    before: tuple[int, int] = (0, 0)  # rows and columns that a padding puts in front
    places: dict[fx.Node, int] = field(default_factory=dict)  # operand node -> place in reads, or -1 - place in takes
    values: dict[fx.Node, Any] = field(default_factory=dict, repr=False)  # of the stage

    @property
    def rows(self) -> int:
        return self.sizes[0]

    @property
    def rest(self) -> tuple[int, ...]:
        """Sizes of the axes of a map behind its rows and columns."""
        value = self.values[self.node]
        volume = isinstance(value, torch.Tensor) and self.dims == NCHW
        return tuple(int(s) for s in value.shape[4:]) if volume else ()

    @property
    def bytes(self) -> int:
        """Of the whole value."""
        return self.row_bytes * (self.rows if self.dims is not None else 1)

    @property
    def complete(self) -> bool:
        """Its map is there at once: it was given, or computed whole."""
        return self.kind in (Kind.SOURCE, Kind.WHOLE)

    @property
    def name(self) -> str:
        return self.node.name

    @kept
    def row(self) -> Op:
        row = op(self.node)
        return replace(row, spatial=Spatial.POINTWISE, piece=None, workspace=None) if self.plain else row

    @property
    def joined(self) -> bool:
        """Its rows and columns lie in one axis."""
        return self.dims is not None and self.dims[0] == self.dims[1]

    @property
    def unit(self) -> int:
        """The places that a row takes along its axis."""
        return self.sizes[1] if self.joined else 1

    def cut(self, x: Any, rows: tuple[int, int] | None, columns: tuple[int, int] | None = None) -> Any:
        """Rows and columns of the value, or of a piece of it from whose first they are counted."""
        assert self.dims is not None
        if rows is not None:
            x = x.narrow(self.dims[0], rows[0] * self.unit, (rows[1] - rows[0]) * self.unit)
        return x if columns is None or self.joined else x.narrow(self.dims[1], columns[0], columns[1] - columns[0])

    @property
    def spatial(self) -> Spatial:
        return self.row.spatial

    @kept
    def job(self) -> Job:
        """What the operation's row computes pieces of this value from."""
        reads = tuple(Read(k.sizes, k.row_bytes, h, w, k.rest) for k, h, w in self.reads)
        whole = (*self.takes[0].sizes, self.takes[0].row_bytes) if self.takes else None
        return Job(
            self.node,
            self.values,
            self.sizes,
            self.dims,
            self.row_bytes,
            reads,
            whole,
            self.rule,
            self.before,
            self.rest,
        )

    @kept
    def keeps_columns(self) -> bool:
        """A reduction over rows alone."""
        row, read = self.row, self.reads[0][0]
        if row.over is None or read.dims is None or self.role:
            return False
        return read.dims[1] not in row.over(bind(self.node), self.values[read.node].dim())

    @kept
    def weight_bytes(self) -> int:
        """Of the parameters that every call reads."""
        module = module_of(self.node)
        held = module.parameters(recurse=False) if module is not None else ()
        return sum(p.numel() * p.element_size() for p in held)

    @kept
    def overwrites(self) -> tuple[int, ...]:
        return may_overwrite(self)

    @kept
    def dense(self) -> bool:
        """Would copy a strided piece itself, unseen."""
        return self.spatial is Spatial.WINDOW or self.kind is Kind.REDUCE


@dataclass
class Stage:
    """Kernels in the order they run; ``sources`` first. Sizes are those of ``values``."""

    graph: fx.GraphModule
    values: dict[fx.Node, Any]
    regions: Regions
    kernels: list[Kernel]
    sources: list[Kernel]
    exits: list[Kernel]
    homes: list[Kernel]  # all their rows lie in one place: outputs that are maps, maps taken whole or spilled
    phases: int
    groups: int

    @property
    def divides(self) -> bool:
        """Every piece of its results can be made by itself: nothing waits for a whole map."""
        return self.phases == 1 and len(self.homes) == len(self.exits) and not self.across

    @property
    def across(self) -> Kernel | None:
        """A value of which every column follows from all columns, or has no columns of its own."""
        ways = (k for k in self.kernels if k.kind is not Kind.WHOLE and (k.joined or k.node in self.regions.across))
        return next(ways, None) or next((k for k in self.kernels if k.kind is Kind.REDUCE and k.keeps_columns), None)

    @kept
    def waiting_bytes(self) -> list[int]:
        """Of the maps that wait in memory behind each phase."""
        readers = {k: [*(user for user, _, _ in k.users), *k.takers] for k in self.kernels}
        return [sum(k.bytes for k in waiting(phase, readers) if not k.spilled) for phase in range(self.phases)]

    @kept
    def clock(self) -> int:
        """Rows of the first map that is complete at once, in which strips are counted."""
        maps = [k for k in self.kernels if k.dims is not None and k.complete and not self.regions.constant(k.node)]
        return next((k.rows for k in maps), 1)


def waiting(phase: int, readers: Mapping[Kernel, Iterable[Kernel]]) -> list[Kernel]:
    """The maps that are there behind a phase because later ones read them."""
    maps = (k for k in readers if k.dims is not None and not k.complete and k.phase <= phase)
    return [k for k in maps if any(user.phase > phase for user in readers[k])]


def may_overwrite(kernel: Kernel) -> tuple[int, ...]:
    """The places in ``reads`` of operands whose memory the result may take: the kernel works element by element."""
    node = kernel.node
    if kernel.role or kernel.kind is not Kind.ROWS:
        return ()
    if op(node).reshapes:
        return (0,) if kernel.reads else ()
    if op(node).spatial is not Spatial.POINTWISE:
        return ()
    if overwriting(node) is None or not isinstance(node.args[0], fx.Node):
        return ()
    both = op(node).commutes and not node.kwargs and len(node.args) == 2
    places = [kernel.places.get(a, -1) for a in (node.args if both else node.args[:1]) if isinstance(a, fx.Node)]
    return tuple(p for p in places if p >= 0)


def overwriting(node: fx.Node) -> Any:
    """The overload that writes its result over its first operand; None where there is none."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    packet = getattr(torch.ops.aten, op_name(node) + "_", None)
    return getattr(packet, node.target._overloadname, None) if packet is not None else None
