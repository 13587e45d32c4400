"""A stage: the nodes of a graph that are executed together, piece by piece, and what each piece needs.

A stage is compiled from its own small graph and the sizes of its values. Its *kernels* are of three kinds:

- ``ROWS``: the output is a feature map, and a piece of it follows from pieces of the operands (`regions`).
- ``REDUCE``: consumes the rows of one map (global pool, mean over H and W, statistics of a norm); nothing comes out
  before the last row has gone in.
- ``WHOLE``: runs once, on complete values: the squeeze of a gate, a classifier, an attention over a whole map.

A kernel that reads what a reduction or a whole value gives belongs to a later *phase* than what those read: the phase
starts when the one before it is through. Values that a later phase reads are kept, or, where that is cheaper, their
producers are run again in the later phase from a smaller value (``recompute``: the two passes of a squeeze-and-
excitation), or for the first time (`_Builder._delay`). What follows from no map at all has phase -1: it runs first.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from splitfx.analysis.live import has_storage, key
from splitfx.analysis.memory import Temporaries
from splitfx.analysis.regions import NCHW, Edge, Regions
from splitfx.ground.exclusive import Autocast, kept
from splitfx.ir.graph import module_of, output_node
from splitfx.ir.ops import Op, Result, Spatial, Window, bind, op, op_name
from splitfx.ir.ops.families.padding import in_front
from splitfx.ir.ops.pieces import Job, Read
from splitfx.ir.ops.row import Dims
from splitfx.tiling.plan.roles import Kind, Roles, is_norm, reduction

BACK = 24  # kernels that are looked at on the way back to a smaller value


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

    def cut(self, x: Any, rows: tuple[int, int] | None, columns: tuple[int, int] | None = None) -> Any:
        """Rows and columns of the value, or of a piece of it from whose first they are counted."""
        assert self.dims is not None
        unit = self.sizes[1] if self.joined else 1
        if rows is not None:
            x = x.narrow(self.dims[0], rows[0] * unit, (rows[1] - rows[0]) * unit)
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
    homes: list[Kernel]  # all their rows lie in one place: the outputs that are maps, and maps that are taken whole
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
    def clock(self) -> int:
        """Rows of the first map that is complete at once, in which strips are counted."""
        maps = [k for k in self.kernels if k.dims is not None and k.complete and not self.regions.constant(k.node)]
        return next((k.rows for k in maps), 1)


# ---------------------------------------------------------------- compiling a stage


def compile_stage(
    graph: fx.GraphModule,
    values: dict[fx.Node, Any],
    recompute: float = float("inf"),
    macs: dict[fx.Node, float] | None = None,
    autocast: Autocast = (),
) -> Stage:
    """The kernels of a stage graph, whose nodes all have a role. ``values`` are its fake values, under ``autocast``.

    ``recompute``: maps of this many bytes or more, that wait for a reduction over themselves, are computed a second
    time instead of being kept. ``macs`` are multiply-accumulates by node, for the planner's estimate of time.
    """
    return _Builder(graph, values, recompute, macs or {}, Temporaries(values, autocast)).build()


class _Builder:
    def __init__(
        self, graph: fx.GraphModule, values: dict[fx.Node, Any], recompute: float, macs: dict[fx.Node, float],
        temporary: Temporaries,
    ) -> None:  # fmt: skip
        self.graph, self.values, self.recompute, self.macs = graph, values, recompute, macs
        self.temporary = temporary
        self.regions = Regions(values)
        self.roles = Roles(graph, self.regions)
        self.of: dict[fx.Node, Kernel] = {}
        self.kernels: list[Kernel] = []

    def build(self) -> Stage:
        for node in self.graph.graph.nodes:
            kind = self.roles.kind[node]
            if kind is None:
                continue
            source = self._aliased(node, kind)
            if source is not None:
                self.of[node] = source
            elif is_norm(node) and not reduction(node, self.regions):
                source = self.of[self.regions.maps(node)[0]]
                statistics = self._kernel(node, Kind.REDUCE, "statistics")
                self._read(statistics, source)
                self.of[node] = applied = self._kernel(node, Kind.ROWS, "apply")
                applied.takes.append(statistics)
                self._read(applied, source)
            else:
                self.of[node] = kernel = self._kernel(node, kind)
                for operand in dict.fromkeys(n for n in node.all_input_nodes if n in self.of):
                    self._read(kernel, self.of[operand])
        self._place_phases()
        self._delay()
        if self.recompute < float("inf"):
            self._run_again()
        exits = self._exits()
        self._group()
        homes = self._homes(exits)
        sources = [k for k in self.kernels if k.kind is Kind.SOURCE]
        for i, kernel in enumerate(self.kernels):
            kernel.index = i
        phases = max((k.phase for k in self.kernels), default=0) + 1
        groups = max((k.group for k in self.kernels), default=0) + 1
        return Stage(self.graph, self.values, self.regions, self.kernels, sources, exits, homes, phases, groups)

    def _aliased(self, node: fx.Node, kind: Kind) -> Kernel | None:
        """The kernel whose value a node returns as it is, in eval mode, or in parts, of which `getitem` takes one."""
        operand = self.of.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        if operand is None or node.op == "placeholder":
            return None
        result = op(node).result
        if op_name(node) == "getitem" and (operand.kind is Kind.REDUCE or operand.row.first_part):
            return operand if operand.kind is not Kind.WHOLE else None  # maxima, whose second part are places
        if kind is Kind.WHOLE or not (result.renames or result is Result.PARTS):
            return None
        if isinstance(module_of(node), nn.RReLU) or (operand.kind is Kind.SOURCE and self._leaves(node)):
            return None
        return operand

    def _leaves(self, node: fx.Node) -> bool:
        return any(user.op == "output" for user in node.users)

    def _kernel(self, node: fx.Node, kind: Kind, role: str = "") -> Kernel:
        dims, value = self.regions.dims[node], self.values[node]
        if kind is Kind.WHOLE and not self.roles.is_map(node, self.regions):
            dims = None
        of = node if kind is not Kind.REDUCE else self.regions.maps(node)[0]
        sizes = (self.regions.rows(of, 0), self.regions.rows(of, 1))
        tensor = value[0] if isinstance(value, list | tuple) else value
        size = (
            tensor.numel() * tensor.element_size() if isinstance(tensor, torch.Tensor) and node.op != "get_attr" else 0
        )
        parts = isinstance(value, list | tuple) and kind is not Kind.REDUCE
        if parts and not (op(node).first_part and kind is Kind.ROWS):  # parts of a map lie in the map
            size = sum(t.numel() * t.element_size() for t in value if isinstance(t, torch.Tensor))
        if role == "statistics":  # two numbers for whatever is taken together, in float64
            size = 16 * _together(node, tensor)
        rows = max(1, self.regions.rows(node, 0)) if dims is not None and kind is not Kind.REDUCE else 1
        dims = dims if kind is not Kind.REDUCE else None
        kernel = Kernel(len(self.kernels), node, kind, dims, sizes, size // rows, role, values=self.values)
        kernel.plain = node in self.regions.beside
        kernel.rule = self.regions.window(node) if kernel.spatial is Spatial.WINDOW and not role else None
        if kernel.spatial is Spatial.PAD and not role:
            axes = len(tensor.shape) - 2
            kernel.before = (in_front(node, 0, axes, self.values), in_front(node, 1, axes, self.values))
        kernel.macs_per_row = self.macs.get(node, 0.0) / max(1, sizes[0])
        if kind is Kind.REDUCE:
            kernel.total_bytes = size if role else tensor.numel() * 8
        elif kind is Kind.WHOLE or (
            node.op == "call_function" and kernel.spatial is Spatial.MOVE and not kernel.row.piece
        ):
            kernel.temporary_bytes = self.temporary(node, dense=kind is not Kind.WHOLE)
        self.kernels.append(kernel)
        return kernel

    def _read(self, kernel: Kernel, operand: Kernel) -> None:
        nodes = [n for n in kernel.node.all_input_nodes if self.of.get(n) is operand]
        taken = self.regions.taken(kernel.node) if kernel.kind is Kind.ROWS and not kernel.role else ()
        if kernel.kind is Kind.WHOLE or operand.dims is None or any(n in taken for n in nodes):
            if operand not in kernel.takes:
                kernel.takes.append(operand)
                kernel.places |= dict.fromkeys(nodes, -len(kernel.takes))
            if kernel.kind is Kind.WHOLE and kernel.lies_in is None and self._views(kernel, operand):
                kernel.lies_in = operand
            return
        if any(operand is known for known, _, _ in kernel.reads):
            return
        kernel.places |= dict.fromkeys(nodes, len(kernel.reads))
        if kernel.kind is Kind.REDUCE:
            h, w = (_identity(size) for size in operand.sizes)
        else:
            h, w = (self.regions.edge(kernel.node, nodes[0], axis) for axis in (0, 1))
        kernel.reads.append((operand, h, w))

    def _views(self, kernel: Kernel, operand: Kernel) -> bool:
        """The value lies in the memory of one that it takes."""
        row, mine, theirs = op(kernel.node), self.values[kernel.node], self.values[operand.node]
        if row.result is Result.OPERAND:
            return True
        held = [{key(t) for t in (v if isinstance(v, list | tuple) else [v]) if has_storage(t)} for v in (mine, theirs)]
        return bool(held[0] & held[1])

    def _place_phases(self) -> None:
        for kernel in self.kernels:
            waits = (Kind.REDUCE, Kind.WHOLE) if kernel.kind is not Kind.WHOLE else ()
            rows = kernel.kind is Kind.ROWS
            before = [k.phase + (k.kind in waits or (rows and k.dims is not None)) for k in kernel.takes]
            before += [k.phase + (k.kind is Kind.WHOLE) for k, _, _ in kernel.reads]
            first = 0 if kernel.kind in (Kind.ROWS, Kind.REDUCE) else -1
            kernel.phase = max([first, *before])

    def _readers(self) -> dict[Kernel, list[Kernel]]:
        readers: dict[Kernel, list[Kernel]] = {k: [] for k in self.kernels}
        for kernel in self.kernels:
            for operand in (*(k for k, _, _ in kernel.reads), *kernel.takes):
                readers[operand].append(kernel)
        return readers

    def _given(self) -> set[Kernel]:
        """What the stage gives, and is kept to the end."""
        return {self.of[n] for n in output_node(self.graph).all_input_nodes}

    def _delay(self) -> None:
        """Compute maps that only later phases read there, where what they are made of is kept until then anyway or is
        no larger."""
        readers, given = self._readers(), self._given()
        for kernel in reversed(self.kernels):
            used = [k.phase - (k.kind is Kind.ROWS and kernel in k.takes) for k in readers[kernel]]
            if kernel.kind is not Kind.ROWS or kernel in given or not used:
                continue
            for phase in range(min(used), kernel.phase, -1):
                kept = [k for k, _, _ in kernel.reads if k.kind is not Kind.SOURCE and k not in given]
                only = [k for k in kept if max((u.phase for u in readers[k] if u is not kernel), default=-1) < phase]
                if sum(k.bytes for k in only) <= kernel.bytes:
                    kernel.phase = phase
                    break

    def _run_again(self) -> None:
        """Give later phases their own kernels for large maps that would wait for a reduction."""
        again: dict[tuple[fx.Node, str, int], Kernel] = {(k.node, k.role, k.phase): k for k in self.kernels}
        readers, given = self._readers(), self._given()
        for kernel in list(self.kernels):
            for place, (operand, h, w) in enumerate(kernel.reads):
                if operand.complete or operand.phase >= kernel.phase or operand in given:
                    continue
                if operand.bytes < self.recompute:
                    continue
                kept = {k for k, users in readers.items() if any(u.phase >= kernel.phase for u in users)}
                roots = self._smallest_before(operand, kept | given)
                if operand not in roots:
                    kernel.reads[place] = (self._clone(operand, roots, kernel.phase, again), h, w)
                    readers = self._readers()
        self._order()

    def _order(self) -> None:
        """Operands before what reads them, and none that nothing reads."""
        ordered: dict[Kernel, None] = {}

        def visit(kernel: Kernel) -> None:
            if kernel not in ordered:
                for operand in (*(k for k, _, _ in kernel.reads), *kernel.takes):
                    visit(operand)
                ordered[kernel] = None

        for kernel in (k for k in self.kernels if k.kind is Kind.SOURCE):
            visit(kernel)
        for node in output_node(self.graph).all_input_nodes:
            visit(self.of[node])
        self.kernels = sorted(ordered, key=lambda k: k.kind is not Kind.SOURCE)

    def _smallest_before(self, kernel: Kernel, kept: set[Kernel]) -> set[Kernel]:
        """The values on the way back from ``kernel`` that are cheapest to keep until a later phase, and that it can be
        computed from again; those that are ``kept`` until then anyway cost nothing."""
        order = {k: i for i, k in enumerate(self.kernels)}
        frontier, best, least = {kernel}, {kernel}, kernel.bytes
        for _ in range(BACK):
            paid = [k for k in frontier if k.kind is not Kind.SOURCE and (k is kernel or k not in kept)]
            cost = sum(k.bytes for k in paid)
            if cost < least:
                best, least = set(frontier), cost
            if least <= kernel.bytes / 2:
                break  # going on would compute much again for little
            last = max(paid, key=order.__getitem__, default=None)
            if last is None or last.kind is not Kind.ROWS or any(k.dims is not None for k in last.takes):
                break
            frontier = (frontier - {last}) | {k for k, _, _ in last.reads}
        return best

    def _clone(
        self, kernel: Kernel, roots: set[Kernel], phase: int, known: dict[tuple[fx.Node, str, int], Kernel]
    ) -> Kernel:
        if kernel in roots or kernel.complete:
            return kernel
        key = (kernel.node, kernel.role, phase)
        if key not in known:
            reads = [(self._clone(k, roots, phase, known), h, w) for k, h, w in kernel.reads]
            twin = replace(kernel, reads=reads, takes=list(kernel.takes), phase=phase, again=True)
            known[key] = twin
            self.kernels.append(twin)
        return known[key]

    def _homes(self, exits: list[Kernel]) -> list[Kernel]:
        """Number the memories of values that have to be complete in one place."""
        for kernel in self.kernels:
            kernel.takers = []
        for kernel in self.kernels:
            for operand in kernel.takes:
                operand.takers.append(kernel)
        taken = [k for k in self.kernels if k.takers and k.dims is not None and not k.complete and k.exit < 0]
        for place, kernel in enumerate([*exits, *taken]):
            kernel.home = place if kernel.home < 0 else kernel.home
        return [*exits, *taken]

    def _exits(self) -> list[Kernel]:
        exits = [self.of[n] for n in output_node(self.graph).all_input_nodes]
        for place, kernel in enumerate(exits):
            if kernel.exit < 0:
                kernel.exit = place
        return exits

    def _group(self) -> None:
        """Kernels of one phase whose maps have as many rows, one after another, fire together."""
        last = -1
        for phase in range(max((k.phase for k in self.kernels), default=0) + 1):
            inside = [k for k in self.kernels if k.phase == phase and k.kind in (Kind.ROWS, Kind.REDUCE)]
            first = last + 1
            for kernel in inside:
                kernel.group = first
                for operand, _, _ in kernel.reads:
                    if not operand.complete and operand.phase == phase:
                        kernel.group = max(kernel.group, operand.group + (operand.rows != kernel.rows))
            last = max((k.group for k in inside), default=last)
            _part(inside)
        for kernel in self.kernels:
            kernel.users = []
        for kernel in self.kernels:
            for operand, h, w in kernel.reads:
                operand.users.append((kernel, h, w))


def _together(node: fx.Node, tensor: torch.Tensor) -> int:
    """How many statistics a norm has: one for each group of channels; a softmax one for each vector along its dim."""
    given = bind(node)
    if op(node).reduces == "exponentials":
        return tensor.numel() // max(1, int(tensor.shape[given["dim"]]))
    return int(tensor.shape[0]) * int(given.get("num_groups") or tensor.shape[1])


def _part(kernels: list[Kernel]) -> None:
    """Number the runs of kernels between values that carry everything, so that no run waits for the next one's halo."""
    levels: dict[int, list[Kernel]] = {}
    for kernel in kernels:
        levels.setdefault(kernel.group, []).append(kernel)
    for members in levels.values():
        last = {operand: i for i, kernel in enumerate(members) for operand, _, _ in kernel.reads}
        crossing, part = -1, 0  # the last reader of anything before the present kernel
        for i, kernel in enumerate(members):
            kernel.part = part
            if crossing <= i:
                part += 1
            crossing = max(crossing, last.get(kernel, -1))


def _identity(size: int) -> Edge:
    rows = np.arange(size)
    return Edge(rows, rows + 1, size)


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
