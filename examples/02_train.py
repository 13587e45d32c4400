"""Split a small residual network and train it with a loop of your own: a split is an ordinary module.

Handwritten digits of scikit-learn (1,797 pictures of 8 × 8), a few passes over them; half a minute on one
core.
"""

from collections import OrderedDict

import torch
from sklearn.datasets import load_digits
from torch import nn

import splitfx
from splitfx.passes import Group


class Residual(nn.Module):
    """Two convs and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(self.first(x)))


def network() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU())
    down = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU())
    return nn.Sequential(
        OrderedDict(
            stem=stem,
            one=Residual(16),
            pool=nn.MaxPool2d(2),
            down=down,
            two=Residual(32),
            mean=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            classify=nn.Linear(32, 10),
        )
    )


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16  # type: ignore[attr-defined]
    labels = torch.tensor(data.target)  # type: ignore[attr-defined]
    order = torch.randperm(len(labels))
    train, test = order[:1400], order[1400:]
    return pictures[train], labels[train], pictures[test], labels[test]


def train(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pictures[batch]), labels[batch]).backward()
            optimizer.step()


def accuracy(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.inference_mode():
        return float((model(pictures).argmax(1) == labels).float().mean())


def main(epochs: int = 4) -> tuple[float, float, float]:
    """Accuracy of the dense model, of the split before and after fine-tuning."""
    torch.manual_seed(0)
    pictures, labels, test_pictures, test_labels = digits()
    dense = network()
    train(dense, pictures, labels, 2 * epochs)

    plan = splitfx.Plan([Group(factors=(2, 4), fusion="keep", calibration=pictures[:64])], input_shape=(64, 1, 8, 8))
    split = splitfx.transform(dense.eval(), plan)
    before = accuracy(split, test_pictures, test_labels)
    train(split, pictures, labels, epochs)

    found = accuracy(dense, test_pictures, test_labels), before, accuracy(split, test_pictures, test_labels)
    print(splitfx.explain(split))
    print("\naccuracy: dense {:.1%}, split {:.1%}, split and fine-tuned {:.1%}".format(*found))
    return found


if __name__ == "__main__":
    main()
