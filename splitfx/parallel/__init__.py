"""A model on several processes or GPUs.

`Shard` divides the image: each rank computes its rows of every map, exactly, forward and backward. `Ranks` divides a
carved model: the branches of its tree run side by side and only logits cross; `place` says which process runs which
groups. Both run one process's share on ``torch.distributed``, started by ``torchrun``. `Streams` runs branches on
streams of one GPU. `Ranks` and `Streams` are for inference. `keep_pages` spares processes on a CPU the wait for memory.
"""

from splitfx.ground.pages import keep_pages
from splitfx.parallel.placement import Placement, place
from splitfx.parallel.ranks import ParallelError, Ranks
from splitfx.parallel.shard import Rows, Shard, ShardPlan
from splitfx.parallel.streams import Streams

__all__ = ["ParallelError", "Placement", "Ranks", "Rows", "Shard", "ShardPlan", "Streams", "keep_pages", "place"]
