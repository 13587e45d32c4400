"""An operation of your own: tell splitfx once what it does, and every pass takes it apart.

Without `register_op` a stage ends at the operation, and a note says so; with it the whole network is tiled.
"""

import torch
from torch import nn

import splitfx
from splitfx.passes import Tile


@torch.library.custom_op("example::soften", mutates_args=())
def soften(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * scale[:, None, None])


@soften.register_fake
def _(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Net(nn.Module):
    """Two convolutions with the operation between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(soften(self.first(x), self.scale))


def main(size: int = 256) -> splitfx.Comparison:
    torch.manual_seed(0)
    splitfx.register_op(
        soften,
        rows="same",  # a row of the output needs the same row of the input
        channels="same",  # channel by channel, so Group and SplitNet divide it
        per_channel=("scale",),  # which has one value a channel
        decomposition=lambda x, scale: torch.tanh(x * scale[:, None, None]),  # what ONNX is written from
    )
    model = Net().eval()
    split = splitfx.transform(model, Tile(), (1, 3, size, size))
    print(splitfx.explain(split))
    found = splitfx.compare(model, split)
    print(f"\n{found}")
    return found


if __name__ == "__main__":
    main()
