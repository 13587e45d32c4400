"""What a model costs before it runs: parameters, work and memory of every layer, from shapes alone.

Nothing is computed: the model is traced and counted on fake tensors. The memory is that of the traced graph
in eval mode (see `splitfx.analysis.memory`); `splitfx.measure` tells what really happens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from splitfx.analysis import Facts, facts
from splitfx.analysis.cost import Uncounted
from splitfx.analysis.shapes import shapes as shapes_of
from splitfx.errors import UnsupportedError
from splitfx.frontend.example_inputs import split_inputs
from splitfx.frontend.trace import trace
from splitfx.ground.notebook import Shown
from splitfx.ground.progress import Say, told
from splitfx.ground.table import dims, number, size, table, wrap
from splitfx.ir.graph import TensorSpec, info, is_canonical, layer
from splitfx.ir.ops import is_size, op_name
from splitfx.report.fold import by_depth, fold

FORMAT = 1
ROWS = 60  # lines of the printed table
HEAD = ("layer", "operation", "output", "params", "MACs", "result", "alive  ")


@dataclass(frozen=True)
class Row:
    """One node of the graph, in order of execution.

    ``layer``: the user's path. ``shape``: of the result (of its first tensor). ``params``: parameters that
    no earlier row used. ``macs``, ``ops``: see `splitfx.analysis.cost`. ``bytes``: the result's, views
    included; ``live_bytes``: all that is alive while the node runs.
    """

    name: str
    layer: str
    op: str
    shape: tuple[int, ...]
    params: int
    macs: int
    ops: int
    bytes: int
    live_bytes: int


@dataclass(frozen=True)
class Profile(Shown):
    """Rows and totals; ``str()`` is a table of at most 100 columns.

    ``params`` counts each parameter once. ``macs``, ``ops`` and ``flops`` (2 × macs) are for one call with
    the given batch. ``peak_bytes`` is reached first in the layer ``peak_node``; ``input_bytes`` of it are the
    inputs. ``uncounted`` names the operators whose work is missing from the figures, and why.
    """

    model: str
    inputs: tuple[str, ...]
    rows: tuple[Row, ...]
    params: int
    macs: int
    ops: int
    flops: int
    peak_bytes: int
    peak_node: str
    input_bytes: int
    uncounted: tuple[Uncounted, ...] = ()

    @property
    def peak_row(self) -> Row | None:
        """The first row where memory peaks."""
        return next((row for row in self.rows if row.live_bytes == self.peak_bytes), None)

    def to_json(self) -> str:
        """Everything as JSON text; sizes in bytes, work in single operations."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1)

    def plot(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Draw memory over time, and parameters and MACs per layer, to ``path`` (png, svg or pdf).

        Raises `MissingExtraError` without matplotlib, `SplitfxError` when the file exists or cannot be
        written.
        """
        from splitfx.report.plots.timeline import draw

        draw(self, path, overwrite=overwrite)

    def save_trace(self, path: str | os.PathLike[str], overwrite: bool = False) -> None:
        """Write the operations and the memory alive as a trace for ui.perfetto.dev; errors as for `plot`."""
        from splitfx.report.perfetto import write_trace

        write_trace(self, path, overwrite)

    def table(self, rows: int | None = ROWS, depth: int | None = None) -> str:
        """The table with at most about ``rows`` lines; None shows every node on a line of its own.

        With ``depth``, a line for every module at so many levels of the module tree instead: 1 are those of the model.
        Raises `UnsupportedError` for a depth below 1.
        """
        if depth is not None and depth < 1:
            raise UnsupportedError(f"depth counts levels of the module tree, 1 or more; got {depth}")
        lines, folded = by_depth(self.rows, depth) if depth is not None else fold(self.rows, rows)
        mark = self.peak_row
        body = [
            (
                line.layer,
                line.op,
                dims(line.shape),
                number(line.params),
                number(line.macs),
                size(line.bytes),
                size(line.live_bytes) + (" <" if mark in line.rows else "  "),
            )
            for line in lines
        ]
        text = table(HEAD, body, left=(0, 1))
        return "\n".join((self._title(), "", text, *((wrap(folded),) if folded else ()), "", *self._totals()))

    def _title(self) -> str:
        return wrap(f"{self.model} on {', '.join(self.inputs)}")

    def _totals(self) -> Iterator[str]:
        yield wrap(
            f"{number(self.params)} parameters, {number(self.macs)} MACs, {number(self.flops)} FLOPs, "
            f"{number(self.ops)} operations with the elementwise ones"
        )
        yield wrap(
            f"< memory peaks at {size(self.peak_bytes)} in {self.peak_node}, "
            f"{size(self.input_bytes)} of it inputs; parameters are apart"
        )
        for one, times in _counted(self.uncounted):
            more = f" and {times - 1} more" if times > 1 else ""
            yield wrap(f"not counted: {one.op} in {one.where}{more}: {one.why}")

    def __str__(self) -> str:
        return self.table()


@told
def profile(model: nn.Module, example_inputs: Any = None, *, progress: Say = True) -> Profile:
    """Count parameters, work and memory of ``model`` for ``example_inputs``, without running it.

    ``model`` is any module, or a graph from `trace` or `transform`, which may go without inputs: the ones
    that it was traced with are taken. ``example_inputs`` is spelled as for `trace`. Raises `TraceError`
    when the model cannot be traced, `UnsupportedError` when inputs are missing or do not fit.
    """
    if not isinstance(model, fx.GraphModule) or not is_canonical(model):
        if example_inputs is None:
            raise UnsupportedError(f"{type(model).__name__} is no traced graph: give profile its example_inputs")
        return _profile(trace(model, example_inputs, verify=False), None)
    return _profile(model, example_inputs)


def _profile(graph: fx.GraphModule, example_inputs: Any) -> Profile:
    known, specs = facts(graph), info(graph).inputs
    if example_inputs is not None and (given := _specs(graph, example_inputs)) != specs:
        known, specs = _other_sizes(graph, given), given
    cost, memory, shapes = known.cost, known.memory, known.shapes
    rows = []
    for node in graph.graph.nodes:
        tensors = [t for t in pytree.tree_leaves(shapes[node]) if isinstance(t, torch.Tensor)]
        if node.op in ("get_attr", "output") or is_size(node) or not tensors:
            continue
        one, alive = cost.rows[node], memory.live_bytes[node]
        where = (node.name, layer(node), _operation(node), tuple(tensors[0].shape))
        rows.append(Row(*where, one.params, one.macs, one.ops, one.bytes, alive))
    return Profile(
        model=info(graph).model_class,
        inputs=tuple(_words(spec) for spec in specs if isinstance(spec, TensorSpec)),
        rows=tuple(rows),
        params=cost.params,
        macs=cost.macs,
        ops=cost.ops,
        flops=cost.flops,
        peak_bytes=memory.peak_bytes,
        peak_node=memory.peak_layer,
        input_bytes=memory.input_bytes,
        uncounted=cost.uncounted,
    )


def _words(spec: TensorSpec) -> str:
    return f"{dims(spec.shape)} {str(spec.dtype).removeprefix('torch.')}"


def _operation(node: fx.Node) -> str:
    if node.op == "placeholder":
        return "input"
    return op_name(node) or str(getattr(node.target, "__name__", node.target))


def _specs(graph: fx.GraphModule, example_inputs: Any) -> tuple[Any, ...]:
    leaves, spec = pytree.tree_flatten(split_inputs(example_inputs, graph))
    expected = info(graph).in_spec
    if spec != expected:
        raise UnsupportedError(
            f"the graph takes {expected.num_leaves} inputs in another structure than the "
            f"{spec.num_leaves} given; spell them as they were given to trace"
        )
    return tuple(TensorSpec.of(v) if isinstance(v, torch.Tensor) else v for v in leaves)


def _other_sizes(graph: fx.GraphModule, specs: tuple[Any, ...]) -> Facts:
    """Facts of a graph for other inputs than those it was traced with."""
    known = Facts(graph)
    known.__dict__["shapes"] = shapes_of(graph, specs)  # fills the cached property
    return known


def _counted(uncounted: Sequence[Uncounted]) -> list[tuple[Uncounted, int]]:
    """One entry per operator and reason, with how often it occurs."""
    found: dict[tuple[str, str], list[Uncounted]] = {}
    for one in uncounted:
        found.setdefault((one.op, one.why), []).append(one)
    return [(same[0], len(same)) for same in found.values()]
