"""A model across ranks, the image divided among them (`Shard`).

`shares` says which rows a rank computes of every value, `awaited` behind which maps ranks wait for each other's rows,
`schedule` makes the instructions of a rank out of those of a tiled stage, `execution` runs them, `tape` is what crosses
and its gradients; `stage` is a stage as a module, `network` a graph of such, `model` the public face.
"""

from splitfx.parallel.shard.model import Shard, ShardPlan
from splitfx.parallel.shard.stage import Rows

__all__ = ["Rows", "Shard", "ShardPlan"]
