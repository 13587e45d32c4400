"""A carved model on several processes or GPUs: the branches of its tree run side by side, only logits cross.

`place` says which process runs which groups; `Ranks` runs one process's share on ``torch.distributed``, started by
``torchrun``; `Streams` runs the branches on streams of one GPU. All of it is inference: train the model itself.
"""

from splitfx.parallel.placement import Placement, place
from splitfx.parallel.ranks import ParallelError, Ranks
from splitfx.parallel.streams import Streams

__all__ = ["ParallelError", "Placement", "Ranks", "Streams", "place"]
