"""What the commands that train share."""

from __future__ import annotations

from torch import fx

from splitfx.cli.progress import Progress
from splitfx.errors import TrainingError
from splitfx.ir.graph import TensorSpec, info
from splitfx.train.data import Data, Shape, load_data


def data_for(split: fx.GraphModule, word: str, progress: Progress) -> Data:
    """The data set in the size that a graph takes. Raises `TrainingError` for a model without one image input."""
    inputs = info(split).inputs
    shape = inputs[0].shape[1:] if len(inputs) == 1 and isinstance(inputs[0], TensorSpec) else ()
    if len(shape) != 3:
        raise TrainingError("the model takes no single image [N, C, H, W]; train it in a loop of your own")
    progress(f"reading {word}")
    image: Shape = (shape[0], shape[1], shape[2])
    return load_data(word, image)
