"""Compiling a stage: the kernels of its small graph, the phases that they run in, what is computed again, and which
values have a memory of their own."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from splitfx.analysis.cost import macs
from splitfx.analysis.live import has_storage, key
from splitfx.analysis.memory import Temporaries
from splitfx.analysis.regions import Edge, Regions
from splitfx.ground.exclusive import Autocast
from splitfx.ir.graph import module_of, output_node
from splitfx.ir.ops import Result, Spatial, bind, in_place, op, op_name
from splitfx.ir.ops.families.padding import in_front
from splitfx.tiling.stage.kernel import KEEP_ALL, Keeping, Kernel, Stage, waiting
from splitfx.tiling.stage.roles import Kind, Roles, is_norm, reduction

BACK = 40  # kernels that are looked at on the way back to a smaller value


def compile_stage(
    graph: fx.GraphModule,
    values: dict[fx.Node, Any],
    keeping: Keeping = KEEP_ALL,
    autocast: Autocast = (),
    awaited: Collection[fx.Node] = (),
) -> Stage:
    """The kernels of a stage graph, whose nodes all have a role. ``values`` are its fake values, under ``autocast``.

    ``keeping``: which maps that wait for a reduction are computed a second time or spilled instead of being kept.
    ``awaited``: maps that are read in later phases only, once all their rows are there.
    """
    return _Builder(graph, values, keeping, Temporaries(values, autocast), awaited).build()


class _Builder:
    def __init__(
        self, graph: fx.GraphModule, values: dict[fx.Node, Any], keeping: Keeping, temporary: Temporaries,
        awaited: Collection[fx.Node],
    ) -> None:  # fmt: skip
        self.graph, self.values, self.keeping = graph, values, keeping
        self.temporary, self.awaited = temporary, awaited
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
        if self.keeping.recompute < float("inf"):
            self._run_again()
        exits = self._exits()
        self._spill()
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
            kernel.before = (in_front(node, 0, self.values, dims), in_front(node, 1, self.values, dims))
        kernel.macs_per_row = macs(node, self.values) / max(1, sizes[0])
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
        """The value lies in the memory of one that it takes; what the model writes there gets a memory of its own."""
        if in_place(kernel.node):
            return False
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
            before += [k.phase + (k.kind is Kind.WHOLE or self._waits(k)) for k, _, _ in kernel.reads]
            first = 0 if kernel.kind in (Kind.ROWS, Kind.REDUCE) else -1
            kernel.phase = max([first, *before])

    def _waits(self, kernel: Kernel) -> bool:
        return kernel.kind is Kind.ROWS and kernel.node in self.awaited

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
            ahead = self._waits(kernel)
            used = [k.phase - (ahead or (k.kind is Kind.ROWS and kernel in k.takes)) for k in readers[kernel]]
            if kernel.kind is not Kind.ROWS or kernel in given or not used:
                continue
            for phase in range(min(used), kernel.phase, -1):
                kept = [k for k, _, _ in kernel.reads if k.kind is not Kind.SOURCE and k not in given]
                only = [k for k in kept if max((u.phase for u in readers[k] if u is not kernel), default=-1) < phase]
                if sum(k.bytes for k in only) <= kernel.bytes:
                    kernel.phase = phase
                    break

    def _run_again(self) -> None:
        """Give later phases their own kernels for maps that would wait for a reduction, where more bytes wait behind a
        phase than may."""
        again: dict[tuple[fx.Node, str, int], Kernel] = {(k.node, k.role, k.phase): k for k in self.kernels}
        given, tried = self._given(), set[tuple[Kernel, int]]()
        while (picked := self._too_much(given, tried)) is not None:
            tried.add(picked)
            operand, phase = picked
            for kernel in [k for k in self._readers()[operand] if k.phase > phase and operand not in k.takes]:
                readers = self._readers()
                kept = {k for k, users in readers.items() if any(u.phase >= kernel.phase for u in users)}
                roots = self._smallest_before(operand, kept | given)
                if operand not in roots:
                    twin = self._clone(operand, roots, kernel.phase, again)
                    kernel.reads = [(twin if k is operand else k, h, w) for k, h, w in kernel.reads]
        self._order()

    def _too_much(self, given: set[Kernel], tried: set[tuple[Kernel, int]]) -> tuple[Kernel, int] | None:
        """Of the maps that wait behind the first phase behind which too much does, the one that is made again with the
        least work for its bytes."""
        readers = self._readers()
        for phase in range(max((k.phase for k in self.kernels), default=0)):
            waits = waiting(phase, readers)
            if sum(k.bytes for k in waits) > self.keeping.recompute:
                left = [k for k in waits if k not in given and (k, phase) not in tried]
                if left:
                    kept = {k for k, users in readers.items() if any(u.phase > phase for u in users)} | given
                    return min(left, key=lambda k: self._work(k, kept) / k.bytes), phase
        return None

    def _work(self, operand: Kernel, kept: set[Kernel]) -> float:
        """Multiply-accumulates, and bytes, for computing a value again."""
        roots, seen, waiting_for = self._smallest_before(operand, kept), set[Kernel](), [operand]
        if operand in roots:
            return float("inf")
        while waiting_for:
            kernel = waiting_for.pop()
            if kernel not in seen and kernel not in roots and not kernel.complete:
                seen.add(kernel)
                waiting_for += [k for k, _, _ in kernel.reads]
        return sum(k.macs_per_row * k.rows + k.bytes for k in seen)

    def _spill(self) -> None:
        """Mark maps that go elsewhere until a later phase reads them, the largest first, where more bytes wait behind a
        phase than may."""
        readers = self._readers()
        taken = {k for kernel in self.kernels for k in kernel.takes}
        for phase in range(max((k.phase for k in self.kernels), default=0)):
            waits = [k for k in waiting(phase, readers) if not k.spilled]
            held = sum(k.bytes for k in waits)
            for kernel in sorted(waits, key=lambda k: -k.bytes):
                if held > self.keeping.spill and kernel.exit < 0 and kernel not in taken:
                    kernel.spilled = self.keeping.to
                    held -= kernel.bytes

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
        there = (kernel.node, kernel.role, phase)
        if there not in known:
            reads = [(self._clone(k, roots, phase, known), h, w) for k, h, w in kernel.reads]
            twin = replace(kernel, reads=reads, takes=list(kernel.takes), phase=phase, again=True)
            known[there] = twin
            self.kernels.append(twin)
        return known[there]

    def _homes(self, exits: list[Kernel]) -> list[Kernel]:
        """Number the memories of values that have to be complete in one place."""
        for kernel in self.kernels:
            kernel.takers = []
        for kernel in self.kernels:
            for operand in kernel.takes:
                operand.takers.append(kernel)
        taken = [k for k in self.kernels if k.takers and k.dims is not None and not k.complete and k.exit < 0]
        homes = [*exits, *taken, *(k for k in self.kernels if k.spilled)]
        for place, kernel in enumerate(homes):
            kernel.home = place if kernel.home < 0 else kernel.home
        return homes

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
