"""Zero halo: the approximate split of Zhuang et al., *CNN Memory Optimization Inference with Splitting Image*.

The image is cut into R x C tiles, each is run as an image of its own (zeros at every side, also where the neighbour
lies) up to a *combine layer*, the results are put side by side and the rest runs whole. Less memory, nothing computed
twice, and **another output**: the inner edges are wrong and fade with depth. Nothing equal is promised; `compare_halo`
says how far off it is, beside the exact halo and beside the same memory saved by a smaller image.

Where tiles can be combined (`combine_layers`): behind a layer whose one map carries everything. `unrolled` is the same
split written out in plain operations, which the pipeline holds a `ZeroHalo` to.

Refuses: sizes that the grid, or a stride inside, does not divide: the parts would not add up to the map.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from splitfx.analysis import Facts
from splitfx.analysis.shapes import shape, shapes
from splitfx.errors import PlanError
from splitfx.ground.table import dims
from splitfx.ir.editing import reorder, tidy
from splitfx.ir.graph import Staged, TensorSpec, copy_graph, layer, set_path
from splitfx.ir.ops import Spatial, in_place, is_size, op
from splitfx.ir.schema import sharing
from splitfx.ir.walks import reached
from splitfx.tiling.plan.instructions import Schedule
from splitfx.tiling.run.executor import Tiled
from splitfx.tiling.run.install import install
from splitfx.tiling.stage.extract import exits_of, sources_of

Grid = tuple[int, int]


class ZeroHalo(Staged):
    """Runs ``stage``, which returns a list of maps, on every tile of its inputs and puts the results together.

    Raises `PlanError` for inputs whose tiles' results do not make up the map of the whole.
    """

    op_name = "zero_halo"

    def __init__(self, stage: fx.GraphModule, grid: Grid) -> None:
        super().__init__()
        if len(grid) != 2 or min(grid) < 1:
            raise PlanError(f"a grid is rows and columns of tiles, both at least 1; got {grid}")
        self.stage, self.grid = stage, (int(grid[0]), int(grid[1]))
        self._fitting: set[Any] = set()

    def extra_repr(self) -> str:
        return f"grid={self.grid[0]}x{self.grid[1]}"

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        self.check(tuple(TensorSpec(tuple(int(s) for s in t.shape), t.dtype, str(t.device)) for t in inputs))
        parts = (self.stage(*(self._crop(t, r, c).contiguous() for t in inputs)) for r, c in self._places())
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return self._joined(list(parts))
        return self._written(parts)

    def check(self, specs: tuple[TensorSpec, ...]) -> None:
        """Raise `PlanError` where inputs of these sizes cannot be split; names the first layer that does not fit."""
        if specs in self._fitting:
            return
        rows, columns = self.grid
        small = []
        for spec in specs:
            if len(spec.shape) != 4:
                small.append(spec)
                continue
            *front, height, width = spec.shape
            if height % rows or width % columns:
                raise PlanError(
                    f"{height}×{width} pixels are not divided by {rows} x {columns} tiles: choose another grid, "
                    "or use `Tile`, whose exact halo takes any size"
                )
            small.append(TensorSpec((*front, height // rows, width // columns), spec.dtype, spec.device))
        self._check_maps(shapes(self.stage, specs), shapes(self.stage, tuple(small)))
        self._fitting.add(specs)

    def _check_maps(self, whole: dict[fx.Node, Any], tile: dict[fx.Node, Any]) -> None:
        given = {n for node in self.stage.graph.nodes if node.op == "output" for n in node.all_input_nodes}
        for node in given:
            if len(shape(whole[node])) != 4:
                raise PlanError(f"layer {layer(node)} gives no map: tiles cannot be combined there")
        for node in self.stage.graph.nodes:
            full, part = shape(whole[node])[2:], shape(tile[node])[2:]
            fits = all(f == p * n for f, p, n in zip(full, part, self.grid, strict=True)) if len(full) == 2 else True
            if not fits and (node in given or full != (1, 1)):
                raise PlanError(
                    f"layer {layer(node)}: tiles give {dims(part)} each, and {self.grid[0]} x {self.grid[1]} of them "
                    f"are not the map's {dims(full)}: combine before it, or choose a size that its strides divide"
                )

    def _places(self) -> Iterator[Grid]:
        return ((r, c) for r in range(self.grid[0]) for c in range(self.grid[1]))

    def _crop(self, x: torch.Tensor, r: int, c: int) -> torch.Tensor:
        if x.dim() != 4:
            return x
        height, width = x.shape[2] // self.grid[0], x.shape[3] // self.grid[1]
        return x[:, :, r * height : (r + 1) * height, c * width : (c + 1) * width]

    def _joined(self, parts: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        wide = self.grid[1]
        bands = [parts[i : i + wide] for i in range(0, len(parts), wide)]
        exits = range(len(parts[0]))
        return [torch.cat([torch.cat([tile[i] for tile in band], 3) for band in bands], 2) for i in exits]

    def _written(self, parts: Iterator[list[torch.Tensor]]) -> list[torch.Tensor]:
        """Every tile goes to its place at once: joined at the end, all would be there twice."""
        found: list[torch.Tensor] = []
        for (r, c), tile in zip(self._places(), parts, strict=True):
            if not found:
                found = [
                    t.new_empty((*t.shape[:2], t.shape[2] * self.grid[0], t.shape[3] * self.grid[1])) for t in tile
                ]
            for whole, part in zip(found, tile, strict=True):
                self._crop(whole, r, c).copy_(part)
            del tile, part  # or they live on while the next tile runs
        return found


def combine_layers(graph: fx.GraphModule, facts: Facts) -> dict[str, fx.Node]:
    """The layers behind which one map carries everything, in order, and the node that gives it; of an activation, or a
    norm, behind a layer only the last."""
    carrying = [n for n in facts.cuts if n.op != "placeholder" and len(shape(facts.shapes[n])) == 4]
    found: dict[str, fx.Node] = {}
    for node in carrying:
        users = list(node.users)
        follows = len(users) == 1 and op(users[0]).spatial is Spatial.POINTWISE and len(users[0].all_input_nodes) == 1
        overwritten = any(in_place(u) and u.args[0] is node for u in users)
        if not follows and not overwritten and min(shape(facts.shapes[node])[2:]) > 1:
            found[layer(node)] = node
    return found


def leading_to(last: fx.Node) -> list[fx.Node]:
    """The nodes that a node is computed of, in order, the node itself at the end; among them those whose results nobody
    reads, but which write into what is read, through a view or not."""
    order = {n: i for i, n in enumerate(last.graph.nodes)}
    families = sharing(last.graph)
    writers = lambda node: [n for n in families[node] if in_place(n) and order[n] < order[last]]  # noqa: E731
    kept = set(reached([last], lambda node: [*node.all_input_nodes, *writers(node)]))
    return [n for n in last.graph.nodes if n in kept and n.op not in ("placeholder", "get_attr") and not is_size(n)]


def install_zero(graph: fx.GraphModule, nodes: Sequence[fx.Node], grid: Grid) -> fx.Node:
    """Replace nodes of a graph, everything up to a combine layer, by one call of a `ZeroHalo`."""
    call = install(graph, nodes, Schedule(), "zero_halo")
    tiled = graph.get_submodule(str(call.target))
    assert isinstance(tiled, Tiled)
    split = ZeroHalo(tiled.stage, grid)
    split.training = graph.training
    set_path(graph, str(call.target), split)
    return call


def unrolled(graph: fx.GraphModule, facts: Facts, nodes: Sequence[fx.Node], grid: Grid) -> fx.GraphModule:
    """A copy of a graph in which ``nodes`` are there once for every tile, between crops and concats."""
    copied = copy_graph(graph, share=True)
    twins = dict(zip(graph.graph.nodes, copied.graph.nodes, strict=True))
    images = {twins[n] for n in sources_of(nodes) if len(shape(facts.shapes[n])) == 4}
    inner = [twins[n] for n in nodes]
    inside = set(inner)
    exits = exits_of(inner)  # also what only a branch without a result reads
    call, aten = copied.graph.call_function, torch.ops.aten

    def crop(x: fx.Node, axis: int, place: int) -> fx.Node:
        return call(operator.getitem, (call(aten.tensor_split.sections, (x, grid[axis], 2 + axis)), place))

    def tile(r: int, c: int) -> dict[fx.Node, fx.Node]:
        found = {x: crop(crop(x, 0, r), 1, c) for x in images}

        def of(node: fx.Node) -> fx.Node:
            if node not in found and is_size(node):  # of the tile, not of the image
                found[node] = copied.graph.node_copy(node, of)
            return found.get(node, node)

        for node in inner:
            found[node] = copied.graph.node_copy(node, of)
        return found

    with copied.graph.inserting_before(inner[-1].next):
        tiles = [[tile(r, c) for c in range(grid[1])] for r in range(grid[0])]
        for exit in exits:
            bands = [call(aten.cat.default, ([parts[exit] for parts in band], 3)) for band in tiles]
            whole = call(aten.cat.default, (bands, 2))
            exit.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in inside)
    for node in reversed(inner):
        copied.graph.erase_node(node)
    reorder(copied, lambda node: ())  # who reads the whole map may have stood before its last tile
    tidy(copied)
    return copied
