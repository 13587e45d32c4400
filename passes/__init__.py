"""The passes: one rewrite per file, found by the registry, imported here for users."""

from splitfx.passes.drop_identity import DropIdentity
from splitfx.passes.fold_batchnorm import FoldBatchNorm
from splitfx.passes.group import Group
from splitfx.passes.separable_pool import SeparablePool
from splitfx.passes.splitnet import SplitNet
from splitfx.passes.subnetworks import SubNetworks
from splitfx.passes.tile import Tile, TileStage
from splitfx.passes.zero_halo import TileZeroHalo

__all__ = [
    "DropIdentity",
    "FoldBatchNorm",
    "Group",
    "SeparablePool",
    "SplitNet",
    "SubNetworks",
    "Tile",
    "TileStage",
    "TileZeroHalo",
]
