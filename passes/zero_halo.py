"""TileZeroHalo: the image is cut into tiles that run one by one with zeros at every edge, as in the paper.

The split of Zhuang et al., *CNN Memory Optimization Inference with Splitting Image* (`splitfx.tiling.zero`): less
memory, nothing computed twice, and **another function**, because the inner edges of the tiles see zeros where their
neighbours lie. `Tile` is the exact one; `splitfx.compare_halo` says what this one costs at each layer.

Refuses a layer behind which tiles cannot be combined, and sizes that the grid, or a stride inside, does not divide.

Promise APPROXIMATE, for a model in eval mode: each tile is what that image alone would give, and nothing is claimed of
the model's output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from splitfx.analysis import Facts
from splitfx.compiler.protocol import Note, Outcome, Pass, Promise
from splitfx.errors import PlanError, nearest
from splitfx.ground import limits
from splitfx.ir.graph import TensorSpec, layer, module_of
from splitfx.text import shown
from splitfx.tiling.stage.extract import sources_of
from splitfx.tiling.zero import ZeroHalo, combine_layers, install_zero, leading_to, unrolled


@dataclass(frozen=True)
class TileZeroHalo(Pass):
    """Run tiles of the image one by one with zeros at their edges: less memory, another output.

    ``grid``: rows and columns of tiles. ``until``: the layer behind which their results are put together and the rest
    runs whole; `splitfx.compare_halo` lists the layers that can be one, with what each costs.
    """

    name: ClassVar[str] = "tile_zero_halo"
    promise: ClassVar[Promise] = Promise.APPROXIMATE
    needs_eval: ClassVar[bool] = True

    grid: tuple[int, int]
    until: str

    def __post_init__(self) -> None:
        super().__post_init__()
        tiles = self.grid[0] * self.grid[1]
        if min(self.grid) < 1 or not 1 < tiles <= limits.TILES:
            raise PlanError(
                f"pass 'tile_zero_halo': grid is rows and columns of 2 to {limits.TILES} tiles in all; "
                f"got {shown(self.grid)}"
            )

    def run(self, graph: fx.GraphModule, facts: Facts) -> Outcome:
        places = combine_layers(graph, facts)
        if self.until not in places:
            raise PlanError(
                f"pass 'tile_zero_halo': tiles cannot be combined behind {self.until!r}.{nearest(self.until, places)} "
                "splitfx.compare_halo(model, inputs) lists the layers where they can, with what each costs"
            )
        nodes = leading_to(places[self.until])
        first = layer(nodes[0])  # before it moves into the stage
        sources = [facts.shapes[n] for n in sources_of(nodes)]
        reference = unrolled(graph, facts, nodes, self.grid)
        split = module_of(install_zero(graph, nodes, self.grid))
        assert isinstance(split, ZeroHalo)
        split.check(tuple(TensorSpec(tuple(map(int, t.shape)), t.dtype, str(t.device)) for t in sources))
        what = (
            f"{self.grid[0]} x {self.grid[1]} tiles with zeros at their edges, combined behind {self.until}: "
            "approximate, not checked against the model; see splitfx.compare_halo"
        )
        return Outcome((Note(f"{first} to {self.until}", what, "did"),), reference)
